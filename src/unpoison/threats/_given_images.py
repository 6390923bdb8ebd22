"""The goals about given images, which are not changed: targeted misclassification and self-concealment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.threats._goal import Goal, loss_away_from, loss_towards


class _AboutImages(Goal):
    """A goal that is measured on images that it holds, all of one class."""

    images: Tensor
    true_label: int
    test_indices: tuple[int, ...]

    def __post_init__(self) -> None:
        name, images = type(self).__name__, self.images
        if images.dtype != torch.uint8 or images.ndim != 4 or not len(images):
            raise InputError(
                f"{name}: images must be uint8 of shape [1 or more, c, h, w], "
                f"found {images.dtype} of shape {tuple(images.shape)}"
            )
        if self.test_indices and len(self.test_indices) != len(images):
            raise InputError(f"{name}: {len(self.test_indices)} test indices, {len(images)} images")
        object.__setattr__(self, "images", images.detach().clone())

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of the given images."""
        return tuple(self.images.shape[1:])

    def victims(self, test_set: TrainingSet) -> tuple[Tensor, Tensor]:
        """The given images."""
        self.check(test_set)
        return self.images, torch.tensor(self.test_indices or (-1,) * len(self.images))


@final
@dataclass(frozen=True, eq=False)
class TargetedMisclassification(_AboutImages, kind="targeted-misclassification"):
    """Given images, unchanged, are to be predicted as the target class.

    Arguments:
        images: UInt8[m c h w], the adversary's target images.
        true_label: the class they belong to.
        target: the class they are to be predicted as (the intended, adversarial label).
        test_indices: their places in the test set, if they are from it.

    Raises:
        InputError: there is no image, the classes are the same, or shapes and types do not match.
    """

    images: Tensor = field(repr=False)
    true_label: int
    target: int
    test_indices: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.classes) < 0 or self.true_label == self.target:
            raise InputError(
                f"TargetedMisclassification: true label {self.true_label} and target {self.target} "
                f"must be two different class numbers >= 0"
            )

    @classmethod
    def of(
        cls, test_set: TrainingSet, indices: int | Sequence[int], *, target: int
    ) -> TargetedMisclassification:
        """The goal for one or more images of a test set, which must have one true label.

        Raises:
            InputError: the images have different labels, or there is none.
        """
        images, label, places = _chosen(test_set, indices)
        return cls(images, label, target, places)

    @property
    def classes(self) -> tuple[int, ...]:
        """The true label and the target."""
        return self.true_label, self.target

    def achieved(self, predicted: Tensor, own: Tensor | None = None) -> Tensor:
        """Bool[m]: which predictions are the target class."""
        return predicted == self.target

    def loss(self, logits: Tensor, own: Tensor | None = None) -> Tensor:
        """Mean cross-entropy towards the target class."""
        return loss_towards(self.target, logits)


@final
@dataclass(frozen=True, eq=False)
class SelfConcealment(_AboutImages, kind="self-concealment"):
    """Given images, unchanged, are to be predicted as anything but their own class.

    The adversary poisons images of that class, for example of a person who is not to be recognised any more
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
        super().__post_init__()
        if self.true_label < 0:
            raise InputError(f"SelfConcealment: true label {self.true_label} must be a class number >= 0")

    @classmethod
    def of(cls, test_set: TrainingSet, indices: int | Sequence[int]) -> SelfConcealment:
        """The goal for one or more images of a test set, which must have one true label.

        Raises:
            InputError: the images have different labels, or there is none.
        """
        return cls(*_chosen(test_set, indices))

    @property
    def classes(self) -> tuple[int, ...]:
        """The true label."""
        return (self.true_label,)

    def achieved(self, predicted: Tensor, own: Tensor | None = None) -> Tensor:
        """Bool[m]: which predictions are not the true class."""
        return predicted != self.true_label

    def loss(self, logits: Tensor, own: Tensor | None = None) -> Tensor:
        """Mean of -log(1 - the true class's probability)."""
        return loss_away_from(self.true_label, logits)


def _chosen(test_set: TrainingSet, indices: int | Sequence[int]) -> tuple[Tensor, int, tuple[int, ...]]:
    """Images UInt8[m c h w], their one label, and their places."""
    places = (indices,) if isinstance(indices, int) else tuple(indices)
    chosen = test_set.subset(places)
    labels = sorted(set(chosen.labels.tolist()))
    if len(labels) != 1:
        raise InputError(f"{test_set.name}: the goal's images must have one true label, found {labels}")
    return chosen.images, labels[0], places
