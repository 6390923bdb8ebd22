"""Noisy gradient: clip the gradient of the batch and add noise to it.

The ablation of Geiping et al., "Witches' Brew" (ICLR 2021, arXiv 2009.02276), that is called differentially
private there, after Hong et al., "On the Effectiveness of Mitigating Data Poisoning Attacks with Gradient
Shaping" (2020, arXiv 2002.11497). The preset "sleeper-agent" has the values of the switches in the code of
Souri et al. 2022 (arXiv 2106.08970).

It clips the sum over the batch, not each example's gradient, so it promises nothing about a single example;
for a promise take DP-SGD.

Cost: none to speak of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from unpoison.defenses._methods import register
from unpoison.errors import InputError
from unpoison.registry import Presets
from unpoison.training import Defense


@final
@register(
    name="noisy-gradient",
    title="Clipped and noisy gradients",
    summary="Clips the gradient of the batch and adds noise to it; promises nothing.",
    paper="Hong et al. 2020, arXiv 2002.11497; as in Geiping et al., ICLR 2021, arXiv 2009.02276",
    cost="none to speak of",
    presets=("sleeper-agent",),
)
@dataclass(frozen=True, kw_only=True)
class NoisyGradient(Defense):
    """The batch's gradient, clipped and with normal noise.

    Arguments:
        clip: the largest norm of the gradient of all parameters together, above 0.
        noise: deviation of the noise on each number of it, as a part of `clip`; 0 or more.

    Raises:
        InputError: a value is out of its range.
    """

    PRESETS: ClassVar[Presets] = {
        "sleeper-agent": {},
    }

    clip: float = 1.0
    noise: float = 0.01

    def __post_init__(self) -> None:
        for name, least in (("clip", 1e-9), ("noise", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= 1e9:
                raise InputError(f"noisy-gradient: {name} must be a number from {least:g}, found {value!r}")

    def gradients(
        self,
        model: nn.Module,
        images: Tensor,
        targets: Tensor,
        *,
        logits_of: Callable[[Tensor], Tensor],
        loss_of: Callable[..., Tensor],
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """The gradient of the mean loss, clipped and with noise."""
        logits = logits_of(images)
        loss = loss_of(logits, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = torch.stack([gradient.square().sum() for gradient in found]).sum().sqrt()
        factor = (self.clip / (norm + 1e-6)).clamp(max=1)
        for gradient in found:
            drawn = torch.randn(gradient.shape, generator=generator, device=gradient.device)
            gradient.mul_(factor).add_(drawn, alpha=self.noise * self.clip)
        return loss, logits
