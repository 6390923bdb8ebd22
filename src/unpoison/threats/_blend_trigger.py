"""`BlendTrigger`: a picture as large as the image, mixed into it.

Chen, Liu, Li, Lu and Song 2017, "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning"
(arXiv 1712.05526), the blended injection strategy: (1 - alpha) image + alpha picture. Published pictures are
a cartoon and uniform noise; alpha is 0.2.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from unpoison._seeds import generator
from unpoison.errors import InputError
from unpoison.threats._eight_bit import check_overlay, check_picture
from unpoison.threats._trigger import Trigger


@final
@dataclass(frozen=True, eq=False)
class BlendTrigger(Trigger, kind="blend"):
    """(1 - alpha) image + alpha picture, rounded to 8 bits; the same bytes on every device.

    Arguments:
        values: UInt8[c h w], the picture; one channel serves images of any number of channels.
        alpha: the share of the picture, in (0, 1].
        name: what to call the trigger in messages and reports.

    Raises:
        InputError: the picture is not UInt8[c h w], or alpha is outside (0, 1].

    >>> trigger = BlendTrigger(torch.full((1, 2, 2), 100, dtype=torch.uint8), alpha=0.25)
    >>> trigger.stamp(torch.zeros(1, 3, 2, 2, dtype=torch.uint8)).unique().tolist()
    [25]
    """

    values: Tensor = field(repr=False)
    alpha: float = 0.2
    name: str = "blend"

    def __post_init__(self) -> None:
        check_picture("BlendTrigger", self.values)
        if not 0 < self.alpha <= 1:
            raise InputError(f"BlendTrigger: alpha {self.alpha} is outside (0, 1]")
        object.__setattr__(self, "values", self.values.detach().cpu().clone())

    @classmethod
    def noise(cls, shape: tuple[int, int, int], *, alpha: float = 0.2, seed: int) -> BlendTrigger:
        """Uniform noise of shape (channels, height, width), the published random pattern."""
        values = torch.randint(
            256, shape, dtype=torch.uint8, generator=generator(seed, "blend trigger", "noise")
        )
        return cls(values, alpha, "noise")

    def stamp(self, images: Tensor) -> Tensor:
        """The mixed images UInt8[b c h w]."""
        check_overlay(f"blend {self.name}", self.values, images)
        # Integers throughout, in 1/65536, so that the same stamp gives the same bytes on every device.
        share = round(self.alpha * 65536)
        picture = self.values.to(images.device, torch.int32) * share
        return ((images.to(torch.int32) * (65536 - share) + picture + 32768) >> 16).to(torch.uint8)
