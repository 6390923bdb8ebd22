"""`LabelNoise`: the goal of label errors, intended or not: a class is predicted as another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.threats._goal import Goal, examples_of_class, loss_away_from, loss_towards


@final
@dataclass(frozen=True)
class LabelNoise(Goal, kind="label-noise"):
    """Test images of the source class, unchanged, are to be predicted as the target, or as any other class.

    Arguments:
        source: the class that is to be predicted wrongly.
        target: what its images are to be predicted as; None for any other class.

    Raises:
        InputError: a class is negative, or both are the same.
    """

    source: int
    target: int | None = None

    def __post_init__(self) -> None:
        if min(self.classes) < 0 or self.source == self.target:
            raise InputError(
                f"LabelNoise: source {self.source} and target {self.target} must be two class numbers >= 0"
            )

    @property
    def classes(self) -> tuple[int, ...]:
        """The source, and the target if there is one."""
        return (self.source,) if self.target is None else (self.source, self.target)

    def victims(self, test_set: TrainingSet) -> tuple[Tensor, Tensor]:
        """The test images of the source class."""
        self.check(test_set)
        indices = examples_of_class(test_set, self.source)
        if not len(indices):
            raise InputError(f"{test_set.name}: no image of class {self.source}")
        return test_set.images[indices], indices

    def achieved(self, predicted: Tensor, own: Tensor | None = None) -> Tensor:
        """Bool[m]: which predictions are the target, or without one, anything but the source."""
        return predicted != self.source if self.target is None else predicted == self.target

    def loss(self, logits: Tensor, own: Tensor | None = None) -> Tensor:
        """Mean cross-entropy towards the target; without one, mean of -log(1 - the source's probability)."""
        if self.target is None:
            return loss_away_from(self.source, logits)
        return loss_towards(self.target, logits)
