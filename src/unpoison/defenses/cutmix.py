"""CutMix: paste a rectangle of another image, and share the label by area.

Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features" (ICCV
2019, arXiv 1905.04899), section 3.1; as a defense against poison Borgnia et al. (ICASSP 2021, arXiv
2011.09527).

A share is drawn once a batch from Beta(alpha, alpha); the rectangle has the sides of the image times the root
of one minus the share, and a centre uniform over the image; what lies beyond the border is cut off, and the
label is shared by what is left.

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
from unpoison.training import Defense, Recipe


@final
@register(
    name="cutmix",
    title="CutMix",
    summary="Pastes a rectangle of another image into each, and shares the label by area.",
    paper="Yun et al., ICCV 2019, arXiv 1905.04899",
    cost="none to speak of",
)
@dataclass(frozen=True, kw_only=True)
class CutMix(Defense):
    """A rectangle of each image is another's.

    Arguments:
        alpha: of the Beta distribution of the share that stays, above 0; 1 is uniform.

    Raises:
        InputError: `alpha` is out of its range.
    """

    alpha: float = 1.0
    _classes: Classes = field(default_factory=Classes, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_alpha("cutmix", self.alpha)

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
        """The patched images, and targets Float[b classes]."""
        shown = augment(images)
        targets = one_hot(labels, self._classes.count)
        others = order(len(images), generator)
        side = dirichlet(self.alpha, 2, generator)[1].sqrt()
        centre = torch.rand(2, generator=generator, device=generator.device)
        rows, columns = (_inside(centre[axis], side, length) for axis, length in enumerate(shown.shape[2:]))
        patch = rows[:, None] & columns[None, :]
        share = patch.float().mean()
        return torch.where(patch, shown[others], shown), (1 - share) * targets + share * targets[others]


def _inside(centre: Tensor, side: Tensor, length: int) -> Tensor:
    """Bool[length]: the positions within the side, a share of the length, around the centre in [0, 1)."""
    middle, half = (centre * length).floor(), (side * length).floor() / 2
    positions = torch.arange(length, device=centre.device)
    return (positions >= (middle - half).floor()) & (positions < (middle + half).floor())
