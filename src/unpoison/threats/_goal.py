"""`Goal`: what the adversary wants, how attacks pursue it and how it is measured.

Success is always measured on 8-bit images with the model in eval mode, and comes with its number of trials. A
goal defines the inputs on which it is measured (`victims`), which predictions count (`achieved`), and the
loss that an attack may minimise (`loss`).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unpoison import _stable
from unpoison._statistics import Proportion
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.models import as_input, logits_of, preserved
from unpoison.threats._tagged import Tagged


class Goal(Tagged):
    """What the adversary wants of a model."""

    @property
    def classes(self) -> tuple[int, ...]:
        """The class numbers that the goal names."""
        return ()

    @property
    def input_shape(self) -> tuple[int, ...] | None:
        """(channels, height, width) of the images that the goal holds; None if it holds none."""
        return None

    @abstractmethod
    def victims(self, test_set: TrainingSet) -> tuple[Tensor, Tensor]:
        """The inputs on which success is measured.

        Returns:
            Images UInt8[m c h w], and Int64[m], their places in the test set (-1 for those not from it).

        Raises:
            InputError: the test set has none, or the goal does not fit it.
        """

    @abstractmethod
    def achieved(self, predicted: Tensor, own: Tensor | None = None) -> Tensor:
        """Bool[m]: which of the predicted labels Int64[m] are what the adversary wants.

        Arguments:
            predicted: one label for each victim.
            own: Int64[m], the victims' classes, see `own_labels`; read by goals that want something else of
                each class.
        """

    @abstractmethod
    def loss(self, logits: Tensor, own: Tensor | None = None) -> Tensor:
        """A scalar, small when the logits Float[m classes] of the victims are what the adversary wants.

        Differentiable; for attacks that optimise it. `own` is as for `achieved`.
        """

    @final
    def check(self, examples: TrainingSet) -> None:
        """Check that the goal fits a set of examples.

        Raises:
            InputError: the set lacks a class that the goal names, or its images have another shape.
        """
        for label in self.classes:
            if label >= examples.num_classes:
                raise InputError(
                    f"{examples.name}: the goal names class {label}, but the classes are "
                    f"0..{examples.num_classes - 1}"
                )
        if self.input_shape not in (None, examples.image_shape):
            raise InputError(
                f"{examples.name}: the images of the goal have shape {self.input_shape}, the set's images "
                f"{examples.image_shape}"
            )

    @final
    def own_labels(self, test_set: TrainingSet, places: Tensor) -> Tensor:
        """Int64[m], on the CPU: the classes of victims at these places of the test set, -1 where unknown."""
        places = places.cpu()
        return torch.where(places < 0, -1, test_set.labels.cpu()[places.clamp(min=0)])

    @final
    def margin(self, logits: Tensor, own: Tensor | None = None, *, zeroed: bool = False) -> Tensor:
        """Float[...]: how far logits Float[... classes] are from what the adversary wants.

        The greatest logit of the unwanted classes minus the greatest of the wanted ones: negative where the
        adversary succeeds. This is the loss of Carlini and Wagner 2017 (arXiv 1608.04644, section IV-A, f6)
        before it is cut off at a confidence.

        Arguments:
            logits: one row for each input, all of them victims of this goal.
            own: Int64[m], the victims' classes, as for `achieved`; logits are then Float[... m classes].
            zeroed: MetaPoison's form, which sets the wanted logits to zero instead of leaving them out, so
                that zero competes with the unwanted logits.
        """
        labels = torch.arange(logits.shape[-1])
        if own is not None:
            labels, own = labels.expand(len(own), -1), own.cpu()[:, None]
        wanted = self.achieved(labels, own).to(logits.device)
        unwanted = logits.masked_fill(wanted, 0.0 if zeroed else -torch.inf).amax(-1)
        return unwanted - logits.masked_fill(~wanted, -torch.inf).amax(-1)

    @final
    def success(self, model: nn.Module, test_set: TrainingSet, *, batch_size: int = 512) -> Proportion:
        """On how many of the victims the model does what the adversary wants.

        The model is used in eval mode on the device where its parameters lie, and is left as it was.

        Raises:
            InputError: the test set has no victims, the goal does not fit it, or the model fails on its
                images.
        """
        images, places = self.victims(test_set)
        achieved = self.achieved(_predict(model, images, batch_size), self.own_labels(test_set, places))
        return Proportion(int(achieved.sum()), len(images))


def loss_towards(label: int | Tensor, logits: Tensor) -> Tensor:
    """Mean of -log p(label) over the rows of Float[m classes]; one label for all, or Int64[m]."""
    return _stable.cross_entropy(logits, _labels(label, logits))


def loss_away_from(label: int | Tensor, logits: Tensor) -> Tensor:
    """Mean of -log(1 - p(label)) over the rows of Float[m classes]; one label for all, or Int64[m]."""
    labels = _labels(label, logits)
    # 1 - p(label) is the sigmoid of the margin.
    return F.softplus(-_stable.margin(logits, labels), threshold=50).mean()


def known(goal: Goal, own: Tensor | None) -> Tensor:
    """The classes of the victims, for a goal that depends on them.

    Raises:
        InputError: they are not given.
    """
    if own is None:
        raise InputError(f"{type(goal).__name__}: what is wanted depends on the class; give own=")
    return own


def examples_of_class(examples: TrainingSet, label: int) -> Tensor:
    """Int64[m]: the examples of a class."""
    return (examples.labels == label).nonzero().reshape(-1)


def _labels(label: int | Tensor, logits: Tensor) -> Tensor:
    if isinstance(label, Tensor):
        return label.to(logits.device)
    return torch.full((len(logits),), label, device=logits.device)


def _predict(model: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    """Int64[m] predicted labels, on the CPU."""
    with preserved(model), torch.no_grad():
        parts = [
            logits_of(model, as_input(model, part, torch.preserve_format)).argmax(1)
            for part in torch.split(images, batch_size)
        ]
    return torch.cat(parts).cpu()
