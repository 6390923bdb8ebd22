"""Gaussian noise: a probe of what a model has learned, and not a harm.

Pawelczyk, Di, Lu, Kamath, Sekhari and Neel 2024, "Machine Unlearning Fails to Remove Data Poisoning Attacks"
(arXiv 2406.17216). Each of a few training images gets its own noise; its label stays. A network that learned
these images has a gradient that correlates with the noise, and one that never saw them has not, which
`evaluation.gaussian_unlearning_score` tests. So unlearning is measured without a trigger.

The goal only names the class on which accuracy is measured beside it; nothing is done to reach it.

Departure: images have 8 bits, so the noise is rounded and cut off at black and white. `moments` gives the
mean and the variance of what is left of it for each pixel value.

Cost: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from unpoison._option_checks import PositiveFloat
from unpoison.attacks._attack import Attack, CraftRequest
from unpoison.attacks._methods import register
from unpoison.threats import PoisonSet


@final
@register(
    name="gaussian-noise",
    title="Gaussian noise",
    summary="Adds noise of its own to each image, by which the Gaussian Unlearning Score is measured.",
    paper="Pawelczyk et al. 2024, arXiv 2406.17216",
    cost="none",
    labels="clean",
    goals=("label-noise",),
    knowledge="a share of the training set; no model",
)
@dataclass(frozen=True, kw_only=True)
class GaussianNoise(Attack):
    """Independent noise on images of all classes.

    Arguments:
        deviation: of the noise before it is cut off, in 1/255, above 0.
    """

    deviation: PositiveFloat = 32.0

    def poison(self, request: CraftRequest) -> PoisonSet:
        """Noisy images with their own labels."""
        indices = request.draw(torch.arange(len(request.training_set)), "the training set")
        clean = request.training_set.subset(indices)
        noise = torch.randn(clean.images.shape, generator=request.generator("noise")) * self.deviation
        noisy = (clean.images.cpu() + noise).round().clamp(0, 255).to(torch.uint8)
        return request.poison_set(indices=indices, images=noisy, labels=clean.labels)


def moments(deviation: float) -> tuple[Tensor, Tensor]:
    """Float64[256] twice: mean and variance of the change of a pixel, by its value, in 1/255.

    Arguments:
        deviation: of the noise before it is rounded and cut off, in 1/255.

    >>> mean, variance = moments(10.0)
    >>> abs(round(float(mean[128]), 6)), round(float(variance[128]), 2)
    (0.0, 100.08)
    """
    values = torch.arange(256, dtype=torch.float64)
    # Of pixel x, y is what is nearest to x + noise; 0 and 255 hold all that lies beyond.
    edges = torch.arange(0.5, 255, dtype=torch.float64)
    below = torch.special.ndtr((edges[None] - values[:, None]) / deviation)
    sides = torch.cat([torch.zeros(256, 1), below, torch.ones(256, 1)], 1)
    shares, change = sides.diff(dim=1), values[None] - values[:, None]
    mean = (shares * change).sum(1)
    return mean, (shares * change.square()).sum(1) - mean.square()


def noise_scores(gradients: Tensor, clean: Tensor, noisy: Tensor, *, deviation: float) -> Tensor:
    """Float64[k]: how far each gradient points along the noise of its image, in standard deviations.

    A standard normal draw where the gradient does not depend on the noise.

    Arguments:
        gradients: Float[k ...], of a loss in the clean images; down it the loss falls.
        clean: UInt8[k ...].
        noisy: UInt8[k ...].
        deviation: of the noise before it was rounded and cut off, in 1/255.
    """
    mean, variance = moments(deviation)
    at = clean.long().flatten(1).cpu()
    slopes = -gradients.double().flatten(1).cpu()
    change = noisy.double().flatten(1).cpu() - at - mean[at]
    spread = (variance[at] * slopes.square()).sum(1).sqrt()
    # A network without any gradient points nowhere.
    return (change * slopes).sum(1) / spread.where(spread > 0, torch.inf)
