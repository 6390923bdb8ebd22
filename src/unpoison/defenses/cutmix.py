"""CutMix: paste a rectangle of another image, and share the label by area.

Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features" (ICCV
2019, arXiv 1905.04899), section 3.1; as a defense against poison Borgnia et al. (ICASSP 2021, arXiv
2011.09527).

A share is drawn once a batch from Beta(alpha, alpha). The sides of the rectangle are those of the image times
the square root of one minus the share, and its centre is uniform over the image; it is clipped at the border,
and labels are mixed by the area that remains.

Cost: negligible, but more epochs are needed to fit the set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from unpoison.defenses._methods import register
from unpoison.defenses._mixing import Alpha, dirichlet, order
from unpoison.training import Batch, Defense


@final
@register(
    name="cutmix",
    title="CutMix",
    summary="Pastes a rectangle of another image into each, and shares the label by area.",
    paper="Yun et al., ICCV 2019, arXiv 1905.04899",
    cost="negligible",
)
@dataclass(frozen=True, kw_only=True)
class CutMix(Defense):
    """A rectangle of each image is replaced by that of another.

    Arguments:
        alpha: of the Beta distribution of the share that is kept, in [0.001, 1000]; 1 is uniform.

    Raises:
        InputError: `alpha` is out of its range.
    """

    alpha: Alpha = 1.0

    def batch(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The patched images, and targets Float[b classes]."""
        images, draws = batch.augment(batch.images), batch.generator
        targets = F.one_hot(batch.labels, batch.num_classes).float()
        others = order(len(images), draws)
        side = dirichlet(self.alpha, 2, draws)[1].sqrt()
        centre = torch.rand(2, generator=draws, device=draws.device)
        rows, columns = (_inside(centre[axis], side, length) for axis, length in enumerate(images.shape[2:]))
        patch = rows[:, None] & columns[None, :]
        share = patch.float().mean()
        return torch.where(patch, images[others], images), (1 - share) * targets + share * targets[others]


def _inside(centre: Tensor, side: Tensor, length: int) -> Tensor:
    """Bool[length]: the positions within `side` around `centre`, both as fractions of the length."""
    middle, half = (centre * length).floor(), (side * length).floor() / 2
    positions = torch.arange(length, device=centre.device)
    return (positions >= (middle - half).floor()) & (positions < (middle + half).floor())
