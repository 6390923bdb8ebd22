"""Mixup: train on weighted means of images, with equally weighted labels.

Zhang, Cissé, Dauphin and Lopez-Paz, "mixup: Beyond Empirical Risk Minimization" (ICLR 2018, arXiv
1710.09412), section 2; as a defense against poison Borgnia et al., "Strong Data Augmentation Sanitizes
Poisoning and Backdoor Attacks Without an Accuracy Tradeoff" (ICASSP 2021, arXiv 2011.09527). Mixing more than
two images is after Borgnia et al., "DP-InstaHide" (2021, arXiv 2103.02079).

Each batch is mixed with itself in another order, after augmentation; the weights are drawn once a batch, from
Beta(alpha, alpha), for more than two images from the Dirichlet distribution.

Cost: none to speak of, but sets take more epochs to fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from unpoison.data import TrainingSet
from unpoison.defenses._methods import register
from unpoison.defenses._mixing import Classes, check_alpha, dirichlet, one_hot, order
from unpoison.errors import InputError
from unpoison.training import Defense, Recipe


@final
@register(
    name="mixup",
    title="Mixup",
    summary="Trains on weighted means of images, with equally weighted labels.",
    paper="Zhang et al., ICLR 2018, arXiv 1710.09412",
    cost="none to speak of",
)
@dataclass(frozen=True, kw_only=True)
class Mixup(Defense):
    """Weighted means of several images.

    Arguments:
        alpha: of the distribution of weights, above 0; 1 is uniform, less keeps closer to one of the images.
        ways: how many images are mixed, 2 or more.

    Raises:
        InputError: a value is out of its range.
    """

    alpha: float = 1.0
    ways: int = 2
    _classes: Classes = field(default_factory=Classes, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_alpha("mixup", self.alpha)
        if isinstance(self.ways, bool) or not isinstance(self.ways, int) or not 2 <= self.ways <= 64:
            raise InputError(f"mixup: ways must be a whole number in 2..64, found {self.ways!r}")

    def begin(self, training_set: TrainingSet, recipe: Recipe, *, seed: int) -> TrainingSet:
        """Note how many classes there are."""
        self._classes.count = training_set.num_classes
        return training_set

    def batch(
        self,
        images: Tensor,
        labels: Tensor,
        indices: Tensor,
        *,
        epoch: int,
        augment: Callable[[Tensor], Tensor],
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """The mixed images, and targets Float[b classes]."""
        shown = augment(images)
        targets = one_hot(labels, self._classes.count)
        weights = dirichlet(self.alpha, self.ways, generator)
        mixed, shares = weights[0] * shown, weights[0] * targets
        for weight in weights[1:]:
            others = order(len(images), generator)
            mixed = mixed + weight * shown[others]
            shares = shares + weight * targets[others]
        return mixed, shares
