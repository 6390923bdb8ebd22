"""`Unlearner`: from a trained model, its training set and the examples to forget to a healed model.

`Unlearner.heal` checks its arguments, once for all methods, and calls the method's own `_heal` with a
`Request`.
"""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from unpoison._option_checks import CheckedOptions
from unpoison._progress import Progress
from unpoison._seeds import as_seed
from unpoison._stable import cross_entropy
from unpoison.data import Examples, TrainingSet
from unpoison.errors import InputError, MismatchError
from unpoison.models import Activations, activations_of, check_network, check_outputs, device_of, usual_mode
from unpoison.registry import Method
from unpoison.training import EpochRecord, Recipe, Trained, Voting, check_training, predict_examples
from unpoison.unlearners._own_loop import kept_indices

BATCH_SIZE = 128
"""Of forward passes without gradients."""
_CHECKED = 64


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """The arguments of `Unlearner.heal`, checked.

    Arguments:
        method: the name of the method, for messages.
        given: the model to heal, as it was given.
        network: the network of it; must not be changed.
        recipe: how to train; None where that is not known.
        built_by: the recipe that the network was trained by, where that is known.
        own_model: whether the network is the caller's own and not built from that recipe.
        start: the network before training, where it was given.
        examples: the training set; of a method with `any_examples` perhaps no `TrainingSet`.
        kept: Int64[k], ascending: the indices of the examples to keep; all without findings.
        forgotten: Int64[f], ascending: those of the examples to forget; none without findings.
        reference: examples that are known to be clean, where some were given.
        seed: of everything random.
        device: where to work.
        progress: as given.
    """

    method: str
    given: Trained | nn.Module
    network: nn.Module
    recipe: Recipe | None
    built_by: Recipe | None
    own_model: bool
    start: nn.Module | None
    examples: Examples
    kept: Tensor
    forgotten: Tensor
    reference: Examples | None
    seed: int
    device: torch.device
    progress: Progress | None

    @cached_property
    def rest(self) -> Examples:
        """The examples to keep."""
        return on_device(self.examples.subset(self.kept), self.device)

    @cached_property
    def forget(self) -> Examples:
        """The examples to forget."""
        return on_device(self.examples.subset(self.forgotten), self.device)

    @cached_property
    def clean(self) -> Examples:
        """The examples that are held to be clean: the reference, or without one the examples to keep."""
        return self.rest if self.reference is None else on_device(self.reference, self.device)

    def copied(self) -> nn.Module:
        """A copy of the network on the device, in eval mode and without gradients."""
        network = copy.deepcopy(self.network).to(self.device).eval()
        network.zero_grad(set_to_none=True)
        return network

    def trainable(self) -> nn.Module:
        """A copy of the network on the device, in its own modes; what is frozen stays frozen.

        Raises:
            InputError: everything is.
        """
        network = self.in_own_modes(self.copied())
        if not any(parameter.requires_grad for parameter in network.parameters()):
            raise InputError(
                f"{self.method}: every parameter is frozen (requires_grad is False), so there is "
                "nothing to train; unfreeze what may change"
            )
        return network

    def in_own_modes(self, network: nn.Module) -> nn.Module:
        """A copy of the network after its modules have been put into the modes that they were given in."""
        for module, given in zip(network.modules(), self.network.modules(), strict=True):
            module.training = given.training
        return network

    def healed(
        self,
        network: nn.Module,
        history: Sequence[EpochRecord],
        *,
        recipe: Recipe | None = None,
        tuning: Mapping[str, Any] | None = None,
    ) -> Healed:
        """The network with the weights of a trained copy of it, and with its own hooks and flags.

        Arguments:
            network: the trained copy.
            history: one record an epoch.
            recipe: how it was trained; that of the request when None.
            tuning: see `Healed`.
        """
        fresh = self.copied()
        fresh.load_state_dict(network.state_dict())
        recipe = self.recipe if recipe is None else recipe
        if recipe is not None and self.built_by is not None:
            # The network is built by this recipe when it is loaded.
            recipe = replace(recipe, model=self.built_by.model, width=self.built_by.width)
        return Healed(fresh, history, recipe, self.own_model, tuning)


@final
@dataclass(frozen=True, eq=False)
class Healed:
    """The result of `Unlearner._heal`.

    Arguments:
        network: the healed network.
        history: one record an epoch.
        recipe: how it was trained; None where that is not known.
        own_model: whether the network is not built from this recipe.
        tuning: how optimiser and learning rate were found, where there was no recipe to train by.
    """

    network: nn.Module
    history: Sequence[EpochRecord]
    recipe: Recipe | None
    own_model: bool
    tuning: Mapping[str, Any] | None = None


class Unlearner(CheckedOptions, ABC):
    """A way to heal a model; its options are the fields of a frozen dataclass.

    The conformance tests check that every unlearner does not read the examples to forget unless its
    declaration says so, leaves the model and the training set as they were, and gives equal models for equal
    seeds.
    """

    method: ClassVar[Method]
    needs_recipe: ClassVar[bool] = False
    """Whether the method cannot do without a recipe; `Request.recipe` is then not None."""
    uses_start: ClassVar[bool] = False
    """Whether the method makes use of the network before training."""
    any_examples: ClassVar[bool] = False
    """Whether it reads inputs and labels alone, and so takes any `Examples`, not 8-bit images only."""
    lose_classes: bool

    @final
    def heal(
        self,
        model: Trained | nn.Module,
        training_set: Examples,
        forget: Tensor | Sequence[int] | None = None,
        *,
        reference: Examples | None = None,
        recipe: Recipe | None = None,
        start: nn.Module | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        progress: Progress | None = None,
    ) -> Trained:
        """The healed model.

        Arguments:
            model: as `train` returned it, or any network (float images in [0, 1] in, logits out); not
                changed.
            training_set: what it was trained on, poison included: 8-bit images, or for methods with
                `any_examples` any.
            forget: the examples to forget: indices Int64[k], in any order, or a mask Bool[n]. None where it
                is not known which they are, for methods that do without (`Method.needs_findings`).
            reference: examples that are known to be clean, of the classes of the training set, for methods
                that repair by some (`Method.uses_reference`); without it they take the examples to keep.
            recipe: how the model was trained; a `Trained` brings its own. For another network "retrain"
                needs one; without one "fine-tune" and "relabel" look for an optimiser and a learning rate,
                and nothing is augmented.
            start: the network before training, freshly built or pretrained, which "retrain" trains on the
                rest, and which "bad-teaching" takes for its incompetent teacher; other methods do not use it.
                Must not have seen the examples to forget. Not changed.
            seed: of everything random.
            device: where to train; None is where a `TrainingSet` lies, with other examples the model.
            progress: called after every epoch, with the stage "training"; "dampening" where nothing is
                trained.

        Returns:
            The healed model, in eval mode on `device`. Of a network of the caller's own it has the class and
            the `state_dict` keys. `seconds` are those of healing; the recipe is how it was trained where the
            method trains by one, else the model's.

        Raises:
            InputError: there is nothing to forget, nothing or no example of a class would be left, an index
                is out of range, or a recipe, a reference or `start` is missing.
            MismatchError: the reference has other classes or inputs than the training set; `start` has other
                weights than the model.
            TrainingDivergedError: a loss or gradient is no longer finite.
        """
        started = time.perf_counter()
        declared = getattr(type(self), "method", None)
        name = type(self).__name__ if declared is None else declared.name
        network = model.model if isinstance(model, Trained) else model
        check_network(network)
        if isinstance(network, Voting):
            raise InputError(
                f"{name}: the model is a vote of networks, which gives no gradients; train it again without "
                "the examples, under the same defense"
            )
        if not isinstance(training_set, TrainingSet) and not self.any_examples:
            raise InputError(f"{name}: works on 8-bit images in memory; give a TrainingSet")
        if reference is not None:
            _check_reference(reference, training_set, any_examples=self.any_examples, method=name)
        kept = torch.arange(len(training_set))
        if forget is not None:
            kept = kept_indices(training_set, forget, lose_classes=self.lose_classes, method=name)
        else:
            self._check_without_findings(training_set, reference, method=name)
        to_forget = torch.ones(len(training_set), dtype=torch.bool)
        to_forget[kept] = False
        if start is not None and self.uses_start:
            _check_start(start, network, method=name)
        known = model.recipe if isinstance(model, Trained) else None
        if self.needs_recipe and recipe is None and known is None:
            raise InputError(
                f"{name}: trains by a recipe, and how this network was trained is not known; give recipe="
            )
        if device is None:
            held = isinstance(training_set, TrainingSet)
            device = training_set.device if held else device_of(network)
        request = Request(
            method=name,
            given=model,
            network=network,
            recipe=known if recipe is None else recipe,
            built_by=known,
            own_model=model.own_model if isinstance(model, Trained) else True,
            start=start,
            examples=training_set,
            kept=kept,
            forgotten=to_forget.nonzero()[:, 0],
            reference=reference,
            seed=as_seed(seed),
            device=torch.device(device),
            progress=progress,
        )
        # The caller may have turned gradients off, or lower precision on.
        with usual_mode(request.device), torch.enable_grad():
            check_outputs(network, training_set.batch(0, _CHECKED)[0], classes=training_set.num_classes)
            self._check_memory(request, activations_of(network, training_set.batch(0, 2)[0]))
            healed = self._heal(request)
        return Trained(
            model=healed.network.eval(),
            recipe=healed.recipe,
            seed=request.seed,
            class_names=request.rest.class_names,
            image_shape=shape_of(training_set),
            training_fingerprint=request.rest.fingerprint,
            history=tuple(healed.history),
            seconds=time.perf_counter() - started,
            own_model=healed.own_model,
            tuning=healed.tuning,
        )

    def _check_without_findings(
        self, training_set: Examples, reference: Examples | None, *, method: str
    ) -> None:
        """That the method can do without knowing what to forget, and has what it needs instead."""
        declared = getattr(type(self), "method", None)
        if declared is None or declared.needs_findings:
            raise InputError(f"{method}: forgets examples that were found; give findings, or their indices")
        if declared.uses_reference and reference is None:
            raise InputError(
                f"{method}: repairs by examples that are known to be clean; give reference=, or findings, of "
                "which it takes the rest"
            )
        if not len(training_set):
            raise InputError(f"{method}: {training_set.name} is empty; there is nothing to heal")

    def _check_memory(self, request: Request, activations: Activations) -> None:
        """Refuse what takes more memory than may be taken; methods that take something else override it."""
        own = getattr(self, "batch_size", None)
        size = own or (BATCH_SIZE if request.recipe is None else request.recipe.batch_size)
        copies = 2 * sum(one.nbytes for one in (*request.network.parameters(), *request.network.buffers()))
        check_training(
            f"heal by {request.method}",
            request.network,
            activations,
            batch_size=min(size, len(request.rest)),
            more={"copies of the network": copies},
        )

    @abstractmethod
    def _heal(self, request: Request) -> Healed:
        """The method itself; `request` must not be changed."""


def shape_of(examples: Examples) -> tuple[int, ...]:
    """The shape of one input; empty for inputs by name."""
    return tuple(examples.input_shape) if isinstance(examples.input_shape, tuple) else ()


def on_device(examples: Examples, device: torch.device) -> Examples:
    """A `TrainingSet` on the device; other examples as they are, since they are moved batch by batch."""
    return examples.to(device) if isinstance(examples, TrainingSet) else examples


def _check_reference(reference: Examples, training_set: Examples, *, any_examples: bool, method: str) -> None:
    if not isinstance(reference, TrainingSet) and not any_examples:
        raise InputError(f"{method}: works on 8-bit images in memory; give a TrainingSet as the reference")
    if not len(reference):
        raise InputError(f"{method}: the reference {reference.name} is empty; give some clean examples")
    expected, found = ((one.num_classes, shape_of(one)) for one in (training_set, reference))
    if expected != found:
        raise MismatchError(
            f"{method}: the reference has {found[0]} classes and inputs of shape {found[1]}, the "
            f"training set {expected[0]} and {expected[1]}; give examples of the same task"
        )


def _check_start(start: nn.Module, network: nn.Module, *, method: str) -> None:
    if start is network:
        raise InputError(f"{method}: start is the model itself; give the network before training")
    expected, found = (
        {key: value.shape for key, value in one.state_dict().items()} for one in (network, start)
    )
    if expected != found:
        differing = [key for key in {**expected, **found} if expected.get(key) != found.get(key)]
        raise MismatchError(
            f"{method}: start has another {differing[0]!r} than the model; build it as the model"
        )


def record_of(
    network: nn.Module, kept: Examples, *, epoch: int, learning_rate: float, started: float
) -> EpochRecord:
    """Loss and accuracy of the network on the kept examples, for an epoch without training.

    Arguments:
        network: in eval mode.
        kept: read once.
        epoch: counted from 0.
        learning_rate: 0 where nothing was trained.
        started: `time.perf_counter()` when the epoch began.
    """
    logits = predict_examples(network, kept, batch_size=BATCH_SIZE)
    return EpochRecord(
        epoch=epoch,
        loss=float(cross_entropy(logits, kept.labels)),
        accuracy=int((logits.argmax(1) == kept.labels).sum()) / len(kept),
        learning_rate=learning_rate,
        examples=len(kept),
        seconds=time.perf_counter() - started,
    )
