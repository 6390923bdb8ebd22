"""`Unlearner`: from a poisoned model, its training set and the examples to forget to a healed model.

Helpers here decide, once for all methods, what may be forgotten and what recipe is meant.
"""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.registry import Method
from unpoison.training import EpochRecord, Recipe, Trained

DEFAULT_PRESET = "sample"
"""The preset that trains a network of which nobody said how it was trained."""


class Unlearner(ABC):
    """A way to heal a model; its options are the fields of a frozen dataclass.

    What the conformance tests ask of every unlearner: it is not touched by the forgotten examples at all
    unless its declaration says that it reads them, leaves the given model and training set as they were, gives the
    same model for the same seed, and refuses with one clear line what cannot be done.
    """

    method: ClassVar[Method]

    @abstractmethod
    def heal(
        self,
        model: Trained | nn.Module,
        training_set: TrainingSet,
        forget: Tensor | Sequence[int],
        *,
        recipe: Recipe | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        on_epoch: Callable[[EpochRecord], None] | None = None,
    ) -> Trained:
        """The healed model.

        Arguments:
            model: the victim, as `train` gave it or any network (float images in [0, 1] in, logits out);
                never changed.
            training_set: what it was trained on, poison included.
            forget: Int64[k], the examples to forget, in any order.
            recipe: how the victim was trained; that of a `Trained` when None, and the preset `sample` for any
                other network.
            seed: where all randomness comes from.
            device: where to train; as `train` chooses when None.
            on_epoch: called after every epoch, for progress.

        Returns:
            The healed model, whose `seconds` are those of healing, to be held against the victim's own. Its
            recipe is how it was trained where the method trains by one, else the victim's.

        Raises:
            InputError: there is nothing to forget, nothing would be left, a class would be left without
                examples, or an index is outside the set.
            TrainingDivergedError: a loss or gradient is no longer finite.
        """

    @abstractmethod
    def epochs_in(self, recipe: Recipe) -> int:
        """How often `on_epoch` will be called, given how the victim was trained; for progress."""


def retained(
    training_set: TrainingSet, forget: Tensor | Sequence[int], *, lose_classes: bool, method: str
) -> TrainingSet:
    """The training set without the examples to forget.

    A class that has no example left cannot be predicted by a model trained on the rest, which is seldom what
    is wanted; it is refused unless `lose_classes`.

    Raises:
        InputError: as `Unlearner.heal` says.
    """
    indices = torch.as_tensor(forget)
    if indices.dtype == torch.bool:
        raise InputError(
            f"{method}: forget must hold the indices of examples, found a mask; give its nonzero()"
        )
    if indices.numel() and (indices.is_floating_point() or indices.is_complex()):
        raise InputError(f"{method}: forget must hold the indices of examples, found {indices.dtype}")
    indices = torch.unique(indices.to(torch.int64))
    if not len(indices):
        raise InputError(f"{method}: nothing to forget; the model is as healed as it can be")
    rest = training_set.without(indices)
    if not len(rest):
        raise InputError(
            f"{method}: all {len(training_set)} examples of {training_set.name} are to be forgotten"
        )
    lost = ((training_set.class_counts() > 0) & (rest.class_counts() == 0)).nonzero().reshape(-1).tolist()
    if lost and not lose_classes:
        named = ", ".join(f"{label} ({training_set.class_names[label]})" for label in lost)
        raise InputError(
            f"{method}: forgetting {len(indices)} examples leaves none of class {named}; forget fewer, "
            f"or allow it with lose_classes"
        )
    return rest


def forgotten(training_set: TrainingSet, forget: Tensor | Sequence[int]) -> TrainingSet:
    """The examples to forget, each once and in ascending order; `retained` has checked the indices."""
    return training_set.subset(torch.unique(torch.as_tensor(forget).to(torch.int64)))


def network_of(model: Trained | nn.Module) -> nn.Module:
    """The network itself."""
    return model.model if isinstance(model, Trained) else model


def recipe_of(model: Trained | nn.Module, recipe: Recipe | None) -> Recipe:
    """The recipe that was given, else the one the model was trained by, else the preset `sample`."""
    if recipe is not None:
        return recipe
    return model.recipe if isinstance(model, Trained) else Recipe.preset(DEFAULT_PRESET)


def recipe_for(model: Trained | nn.Module, recipe: Recipe | None) -> Recipe:
    """`recipe_of`, but of the victim's own network, from which a stored model is built again."""
    how = recipe_of(model, recipe)
    if isinstance(model, Trained):
        how = replace(how, model=model.recipe.model, width=model.recipe.width)
    return how


def with_weights(victim: nn.Module, state: Mapping[str, Tensor], device: torch.device | None) -> nn.Module:
    """A fresh copy of the victim with other weights, in eval mode: its hooks and flags are the victim's."""
    healed = copy.deepcopy(victim)
    healed.zero_grad(set_to_none=True)
    healed.load_state_dict(state)
    return healed.to(device).eval()


def healed_of(
    model: Trained | nn.Module,
    network: nn.Module,
    rest: TrainingSet,
    *,
    recipe: Recipe,
    seed: int,
    history: Sequence[EpochRecord],
    started: float,
) -> Trained:
    """What `heal` returns of a method that does not train by a recipe.

    Arguments:
        model: the victim as given.
        network: holds the healed weights, on the device that the healed model is to lie on.
        rest: the examples that are kept.
        recipe: from `recipe_for`.
        seed: as given.
        history: one record a call of `on_epoch`.
        started: `time.perf_counter()` when healing began.
    """
    device = next((tensor.device for tensor in (*network.parameters(), *network.buffers())), None)
    return Trained(
        model=with_weights(network_of(model), network.state_dict(), device),
        recipe=recipe,
        seed=seed,
        class_names=rest.class_names,
        image_shape=rest.image_shape,
        training_fingerprint=rest.fingerprint,
        history=tuple(history),
        seconds=time.perf_counter() - started,
        own_model=model.own_model if isinstance(model, Trained) else True,
    )
