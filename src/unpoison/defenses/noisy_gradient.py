"""Noisy gradient: clip the gradient of the batch and add noise to it.

An ablation of Geiping et al., "Witches' Brew" (ICLR 2021, arXiv 2009.02276), called differentially private
there, after Hong et al., "On the Effectiveness of Mitigating Data Poisoning Attacks with Gradient Shaping"
(2020, arXiv 2002.11497). The preset "sleeper-agent" has the values of the code of Souri et al. 2022 (arXiv
2106.08970).

The gradient of the batch is clipped, not that of each example, so there is no privacy guarantee; DP-SGD has
one.

Cost: negligible.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from unpoison._option_checks import NonNegativeFloat, PositiveFloat
from unpoison.defenses._methods import register
from unpoison.registry import Presets
from unpoison.training import Defense, Step


@final
@register(
    name="noisy-gradient",
    title="Clipped and noisy gradients",
    summary="Clips the gradient of the batch and adds noise to it; no privacy guarantee.",
    paper="Hong et al. 2020, arXiv 2002.11497; as in Geiping et al., ICLR 2021, arXiv 2009.02276",
    cost="negligible",
    presets=("sleeper-agent",),
)
@dataclass(frozen=True, kw_only=True)
class NoisyGradient(Defense):
    """The gradient of the batch, clipped, with normal noise.

    Arguments:
        clip: the largest norm of the gradient of all parameters together, above 0.
        noise: standard deviation of the noise on each of its entries, as a fraction of `clip`; 0 or more.

    Raises:
        InputError: a value is out of its range.
    """

    PRESETS: ClassVar[Presets] = {"sleeper-agent": {}}

    clip: PositiveFloat = 1.0
    noise: NonNegativeFloat = 0.01

    def gradients(self, step: Step) -> tuple[Tensor, Tensor]:
        """The gradient of the mean loss, clipped, with noise."""
        loss, logits = super().gradients(step)
        found = [parameter.grad for parameter in step.model.parameters() if parameter.grad is not None]
        norm = torch.stack([gradient.square().sum() for gradient in found]).sum().sqrt()
        factor = (self.clip / (norm + 1e-6)).clamp(max=1)
        for gradient in found:
            drawn = torch.randn(gradient.shape, generator=step.generator, device=gradient.device)
            gradient.mul_(factor).add_(drawn, alpha=self.noise * self.clip)
        return loss, logits
