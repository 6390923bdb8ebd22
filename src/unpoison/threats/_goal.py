"""`Goal`: what the adversary wants, as an object that says how to pursue it and how to measure it.

Success is always measured on 8-bit images with the model in eval mode, and comes with its number of trials.
A goal that differs in what counts as success (anything but the true label, say) defines `achieved` and
`loss`; one that differs in the inputs it is about defines `victims`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unpoison._statistics import Proportion
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.models import preserved
from unpoison.threats._tagged import Tagged, prefixed, under
from unpoison.threats._trigger import Trigger


class Goal(Tagged):
    """What the adversary wants of a model."""

    @abstractmethod
    def victims(self, test_set: TrainingSet) -> tuple[Tensor, Tensor]:
        """The inputs on which success is measured.

        Returns:
            Images UInt8[m c h w], and Int64[m], their places in the test set (-1 for those not from it).

        Raises:
            InputError: the test set has none, or the goal does not fit it.
        """

    @abstractmethod
    def achieved(self, predicted: Tensor) -> Tensor:
        """Bool[m]: which of the predicted labels Int64[m] are what the adversary wants."""

    @abstractmethod
    def loss(self, logits: Tensor) -> Tensor:
        """A scalar, small when the logits Float[m classes] of the victims are what the adversary wants.

        Differentiable; for attacks that optimise it.
        """

    @final
    def margin(self, logits: Tensor, *, zeroed: bool = False) -> Tensor:
        """Float[...]: how far logits Float[... classes] are from what the adversary wants.

        The greatest logit of the classes he does not want less the greatest of those he wants: negative where
        he succeeds. This is the loss of Carlini and Wagner 2017 (arXiv 1608.04644, section IV-A, f6) before
        it is cut off at a confidence.

        Arguments:
            logits: one row an input, all of them victims of this goal.
            zeroed: MetaPoison's form, which sets the wanted logits to zero instead of leaving them out, so
                that zero too is a rival.
        """
        wanted = self.achieved(torch.arange(logits.shape[-1])).to(logits.device)
        rivals = logits.masked_fill(wanted, 0.0 if zeroed else -torch.inf).amax(-1)
        return rivals - logits.masked_fill(~wanted, -torch.inf).amax(-1)

    @final
    def success(self, model: nn.Module, test_set: TrainingSet, *, batch_size: int = 512) -> Proportion:
        """On how many of the victims the model does what the adversary wants.

        The model is used in eval mode on the device where its parameters lie, and is left as it was.

        Raises:
            InputError: the test set has no victims, or the goal does not fit it.
        """
        images, _ = self.victims(test_set)
        achieved = self.achieved(_predict(model, images, batch_size))
        return Proportion(int(achieved.sum()), len(images))


@final
@dataclass(frozen=True)
class Backdoor(Goal, kind="backdoor"):
    """Images of the source class that bear the trigger are to be predicted as the target class.

    Arguments:
        trigger: the stamp.
        source: the class whose images the trigger is put on; None for all classes but the target.
        target: the class they are to be taken for.

    Raises:
        InputError: a class is negative, or source and target are the same.
    """

    trigger: Trigger
    source: int | None
    target: int

    def __post_init__(self) -> None:
        if self.target < 0 or (self.source is not None and self.source < 0):
            raise InputError(
                f"Backdoor: source {self.source} and target {self.target} must be class numbers >= 0"
            )
        if self.source == self.target:
            raise InputError(f"Backdoor: source and target are the same class {self.target}")

    def candidates(self, training_set: TrainingSet) -> Tensor:
        """Int64[m]: the examples of the source class (of all classes but the target when the source is None).

        Raises:
            InputError: the set does not have the source or target class.
        """
        for label in (self.source, self.target):
            if label is not None and label >= training_set.num_classes:
                raise InputError(
                    f"{training_set.name}: the backdoor names class {label}, "
                    f"but the classes are 0..{training_set.num_classes - 1}"
                )
        labels = training_set.labels
        chosen = labels != self.target if self.source is None else labels == self.source
        return chosen.nonzero().reshape(-1)

    def victims(self, test_set: TrainingSet) -> tuple[Tensor, Tensor]:
        """The stamped test images of the source class, or of all classes but the target."""
        indices = self.candidates(test_set)
        if not len(indices):
            what = "class but the target" if self.source is None else f"class {self.source}"
            raise InputError(f"{test_set.name}: no image of {what} to put the trigger on")
        return self.trigger.stamp(test_set.images[indices]), indices

    def achieved(self, predicted: Tensor) -> Tensor:
        """Bool[m]: which predictions are the target class."""
        return predicted == self.target

    def loss(self, logits: Tensor) -> Tensor:
        """Mean cross-entropy towards the target class."""
        return _cross_entropy_towards(self.target, logits)

    def configuration(self) -> dict[str, Any]:
        """Source, target and the trigger's own configuration."""
        return {"source": self.source, "target": self.target, "trigger": self.trigger.to_json()}

    def tensors(self) -> dict[str, Tensor]:
        """The trigger's tensors under `trigger.`."""
        return prefixed("trigger", self.trigger.tensors())

    @classmethod
    def restore(cls, configuration: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Backdoor:
        """The backdoor that was stored."""
        trigger = Trigger.from_json(configuration["trigger"], under("trigger", tensors))
        return cls(trigger, configuration["source"], configuration["target"])


@final
@dataclass(frozen=True, eq=False)
class TargetedMisclassification(Goal, kind="targeted-misclassification"):
    """Given images, unchanged, are to be predicted as the target class.

    Arguments:
        images: UInt8[m c h w], the adversary's target images.
        true_label: the class they belong to.
        target: the class they are to be taken for (the intended, adversarial label).
        test_indices: their places in the test set, if they are from it.

    Raises:
        InputError: there is no image, the classes are the same, or shapes and types do not match.
    """

    images: Tensor = field(repr=False)
    true_label: int
    target: int
    test_indices: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or not len(self.images):
            raise InputError(
                f"TargetedMisclassification: images must be uint8 of shape [1 or more, c, h, w], "
                f"found {self.images.dtype} of shape {tuple(self.images.shape)}"
            )
        if self.true_label < 0 or self.target < 0 or self.true_label == self.target:
            raise InputError(
                f"TargetedMisclassification: true label {self.true_label} and target {self.target} "
                f"must be two different class numbers >= 0"
            )
        if self.test_indices and len(self.test_indices) != len(self.images):
            raise InputError(
                f"TargetedMisclassification: {len(self.test_indices)} test indices, {len(self.images)} images"
            )
        object.__setattr__(self, "images", self.images.detach().clone())

    @classmethod
    def of(
        cls, test_set: TrainingSet, indices: int | tuple[int, ...], *, target: int
    ) -> TargetedMisclassification:
        """The goal for one or more images of a test set, which must have one true label.

        Raises:
            InputError: the images have different labels, or there is none.
        """
        places = (indices,) if isinstance(indices, int) else tuple(indices)
        chosen = test_set.subset(places)
        labels = sorted(set(chosen.labels.tolist()))
        if len(labels) != 1:
            raise InputError(f"{test_set.name}: target images must have one true label, found {labels}")
        return cls(chosen.images, labels[0], target, places)

    def victims(self, test_set: TrainingSet) -> tuple[Tensor, Tensor]:
        """The given images."""
        if self.images.shape[1:] != test_set.image_shape:
            raise InputError(
                f"{test_set.name}: the target images have shape {tuple(self.images.shape[1:])}, "
                f"the set's images {test_set.image_shape}"
            )
        return self.images, torch.tensor(self.test_indices or (-1,) * len(self.images))

    def achieved(self, predicted: Tensor) -> Tensor:
        """Bool[m]: which predictions are the target class."""
        return predicted == self.target

    def loss(self, logits: Tensor) -> Tensor:
        """Mean cross-entropy towards the target class."""
        return _cross_entropy_towards(self.target, logits)

    def configuration(self) -> dict[str, Any]:
        """The two labels and the places in the test set."""
        return {
            "true_label": self.true_label,
            "target": self.target,
            "test_indices": list(self.test_indices),
        }

    def tensors(self) -> dict[str, Tensor]:
        """`images` UInt8[m c h w]."""
        return {"images": self.images}

    @classmethod
    def restore(
        cls, configuration: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> TargetedMisclassification:
        """The goal that was stored."""
        return cls(
            tensors["images"],
            configuration["true_label"],
            configuration["target"],
            tuple(configuration["test_indices"]),
        )


@final
@dataclass(frozen=True, eq=False)
class SelfConcealment(Goal, kind="self-concealment"):
    """Given images, unchanged, are to be predicted as anything but what they are.

    The adversary poisons images of his own class, so that his own face, say, is no longer recognised
    (Huang et al. 2020, arXiv 2004.00225, figure 7).

    Arguments:
        images: UInt8[m c h w], the images to be concealed.
        true_label: the class they belong to.
        test_indices: their places in the test set, if they are from it.

    Raises:
        InputError: there is no image, the class is negative, or shapes and types do not match.
    """

    images: Tensor = field(repr=False)
    true_label: int
    test_indices: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or not len(self.images):
            raise InputError(
                f"SelfConcealment: images must be uint8 of shape [1 or more, c, h, w], "
                f"found {self.images.dtype} of shape {tuple(self.images.shape)}"
            )
        if self.true_label < 0:
            raise InputError(f"SelfConcealment: true label {self.true_label} must be a class number >= 0")
        if self.test_indices and len(self.test_indices) != len(self.images):
            raise InputError(
                f"SelfConcealment: {len(self.test_indices)} test indices, {len(self.images)} images"
            )
        object.__setattr__(self, "images", self.images.detach().clone())

    @classmethod
    def of(cls, test_set: TrainingSet, indices: int | tuple[int, ...]) -> SelfConcealment:
        """The goal for one or more images of a test set, which must have one true label.

        Raises:
            InputError: the images have different labels, or there is none.
        """
        places = (indices,) if isinstance(indices, int) else tuple(indices)
        chosen = test_set.subset(places)
        labels = sorted(set(chosen.labels.tolist()))
        if len(labels) != 1:
            raise InputError(f"{test_set.name}: the images must have one true label, found {labels}")
        return cls(chosen.images, labels[0], places)

    def victims(self, test_set: TrainingSet) -> tuple[Tensor, Tensor]:
        """The given images."""
        if self.images.shape[1:] != test_set.image_shape:
            raise InputError(
                f"{test_set.name}: the images to be concealed have shape {tuple(self.images.shape[1:])}, "
                f"the set's images {test_set.image_shape}"
            )
        return self.images, torch.tensor(self.test_indices or (-1,) * len(self.images))

    def achieved(self, predicted: Tensor) -> Tensor:
        """Bool[m]: which predictions are not the true class."""
        return predicted != self.true_label

    def loss(self, logits: Tensor) -> Tensor:
        """Mean of -log(1 - the true class's probability)."""
        others = torch.arange(logits.shape[1], device=logits.device) != self.true_label
        return (logits.logsumexp(1) - logits[:, others].logsumexp(1)).mean()

    def configuration(self) -> dict[str, Any]:
        """The label and the places in the test set."""
        return {"true_label": self.true_label, "test_indices": list(self.test_indices)}

    def tensors(self) -> dict[str, Tensor]:
        """`images` UInt8[m c h w]."""
        return {"images": self.images}

    @classmethod
    def restore(cls, configuration: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SelfConcealment:
        """The goal that was stored."""
        return cls(tensors["images"], configuration["true_label"], tuple(configuration["test_indices"]))


def _cross_entropy_towards(label: int, logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, torch.full((len(logits),), label, device=logits.device))


def _predict(model: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    """Int64[m] predicted labels, on the CPU."""
    parameter = next(model.parameters(), None)
    device = images.device if parameter is None else parameter.device
    with preserved(model), torch.no_grad():
        parts = [
            model(images[start : start + batch_size].to(device).float().div_(255)).argmax(1)
            for start in range(0, len(images), batch_size)
        ]
    return torch.cat(parts).cpu()
