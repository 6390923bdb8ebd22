"""Mixup: train on weighted means of images and, with the same weights, of their labels.

Zhang, Cissé, Dauphin and Lopez-Paz, "mixup: Beyond Empirical Risk Minimization" (ICLR 2018, arXiv
1710.09412), section 2; as a defense against poison Borgnia et al., "Strong Data Augmentation Sanitizes
Poisoning and Backdoor Attacks Without an Accuracy Tradeoff" (ICASSP 2021, arXiv 2011.09527). Mixing more than
two images is after Borgnia et al., "DP-InstaHide" (2021, arXiv 2103.02079).

Each batch is mixed with itself in another order, after augmentation. The weights are drawn once a batch, from
Beta(alpha, alpha); for more than two images from the Dirichlet distribution.

Cost: negligible, but more epochs are needed to fit the set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, final

import torch.nn.functional as F
from torch import Tensor

from unpoison.defenses._methods import register
from unpoison.defenses._mixing import Alpha, dirichlet, order
from unpoison.training import Batch, Defense


@final
@register(
    name="mixup",
    title="Mixup",
    summary="Trains on weighted means of images, and of their labels with the same weights.",
    paper="Zhang et al., ICLR 2018, arXiv 1710.09412",
    cost="negligible",
)
@dataclass(frozen=True, kw_only=True)
class Mixup(Defense):
    """Weighted means of several images.

    Arguments:
        alpha: of the distribution of weights, in [0.001, 1000]; 1 is uniform, below 1 one image dominates.
        ways: how many images are mixed, 2 to 64.

    Raises:
        InputError: a value is out of its range.
    """

    alpha: Alpha = 1.0
    ways: Annotated[int, "[2, 64]"] = 2

    def batch(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The mixed images, and targets Float[b classes]."""
        images = batch.augment(batch.images)
        targets = F.one_hot(batch.labels, batch.num_classes).float()
        weights = dirichlet(self.alpha, self.ways, batch.generator)
        mixed, shares = weights[0] * images, weights[0] * targets
        for weight in weights[1:]:
            others = order(len(images), batch.generator)
            mixed = mixed + weight * images[others]
            shares = shares + weight * targets[others]
        return mixed, shares
