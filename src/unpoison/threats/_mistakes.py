"""`Mistakes`: the goal of label errors, honest or not: images of a class are to be taken for another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.threats._goal import Goal


@final
@dataclass(frozen=True)
class Mistakes(Goal, kind="mistakes"):
    """Test images of the source class, unchanged, are to be predicted as the target, or as anything else.

    Arguments:
        source: the class that is to be got wrong.
        target: what its images are to be taken for; None for any class but their own.

    Raises:
        InputError: a class is negative, or both are the same.
    """

    source: int
    target: int | None = None

    def __post_init__(self) -> None:
        if self.source < 0 or (self.target is not None and self.target < 0) or self.source == self.target:
            raise InputError(
                f"Mistakes: source {self.source} and target {self.target} must be two class numbers >= 0"
            )

    def candidates(self, training_set: TrainingSet) -> Tensor:
        """Int64[m]: the examples of the source class.

        Raises:
            InputError: the set does not have the source or target class.
        """
        for label in (self.source, self.target):
            if label is not None and label >= training_set.num_classes:
                raise InputError(
                    f"{training_set.name}: the goal names class {label}, "
                    f"but the classes are 0..{training_set.num_classes - 1}"
                )
        return (training_set.labels == self.source).nonzero().reshape(-1)

    def victims(self, test_set: TrainingSet) -> tuple[Tensor, Tensor]:
        """The test images of the source class."""
        indices = self.candidates(test_set)
        if not len(indices):
            raise InputError(f"{test_set.name}: no image of class {self.source}")
        return test_set.images[indices], indices

    def achieved(self, predicted: Tensor) -> Tensor:
        """Bool[m]: which predictions are the target, or without one, anything but the source."""
        return predicted != self.source if self.target is None else predicted == self.target

    def loss(self, logits: Tensor) -> Tensor:
        """Mean cross-entropy towards the target; without one, the mean probability of the source class."""
        if self.target is None:
            return logits.softmax(1)[:, self.source].mean()
        wanted = torch.full((len(logits),), self.target, device=logits.device)
        return F.cross_entropy(logits, wanted)

    def configuration(self) -> dict[str, Any]:
        """The two classes."""
        return {"source": self.source, "target": self.target}

    def tensors(self) -> dict[str, Tensor]:
        """None."""
        return {}

    @classmethod
    def restore(cls, configuration: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Mistakes:
        """The goal that was stored."""
        return cls(configuration["source"], configuration["target"])
