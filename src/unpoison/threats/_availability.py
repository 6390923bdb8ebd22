"""`Availability`: the goal of poison that makes a training set useless: test images are predicted wrongly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.threats._goal import Goal, known, loss_away_from


@final
@dataclass(frozen=True)
class Availability(Goal, kind="availability"):
    """Test images of all classes, unchanged, are to be predicted as anything but their own class.

    The success rate is the error on the test set. A network without poison has an error too, so what the
    poison did is the difference to a control.
    """

    def victims(self, test_set: TrainingSet) -> tuple[Tensor, Tensor]:
        """All test images."""
        if not len(test_set):
            raise InputError(f"{test_set.name}: has no image to measure on")
        return test_set.images, torch.arange(len(test_set), device=test_set.device)

    def achieved(self, predicted: Tensor, own: Tensor | None = None) -> Tensor:
        """Bool[m]: which predictions are not the victim's own class."""
        return predicted != known(self, own)

    def loss(self, logits: Tensor, own: Tensor | None = None) -> Tensor:
        """Mean of -log(1 - the own class's probability)."""
        return loss_away_from(known(self, own), logits)
