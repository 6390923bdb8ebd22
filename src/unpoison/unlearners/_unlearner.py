"""`Unlearner`: from a poisoned model, its training set and the examples to forget to a healed model.

Helpers here decide, once for all methods, what may be forgotten and what recipe is meant.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.training import EpochRecord, Recipe, Trained

DEFAULT_PRESET = "sample"
"""The preset that trains a network of which nobody said how it was trained."""


class Unlearner(ABC):
    """A way to heal a model; its options are the fields of a frozen dataclass.

    What the conformance tests ask of every unlearner: it never trains on a forgotten example, leaves the
    given model and training set as they were, gives the same model for the same seed, and refuses with one
    clear line what cannot be done.
    """

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

        Raises:
            InputError: there is nothing to forget, nothing would be left, a class would be left without
                examples, or an index is outside the set.
        """


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


def network_of(model: Trained | nn.Module) -> nn.Module:
    """The network itself."""
    return model.model if isinstance(model, Trained) else model


def recipe_of(model: Trained | nn.Module, recipe: Recipe | None) -> Recipe:
    """The recipe that was given, else the one the model was trained by, else the preset `sample`."""
    if recipe is not None:
        return recipe
    return model.recipe if isinstance(model, Trained) else Recipe.preset(DEFAULT_PRESET)
