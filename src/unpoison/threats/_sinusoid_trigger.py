"""`SinusoidTrigger`: vertical stripes, a sine along the columns.

Barni, Kallas and Tondi 2019, "A New Backdoor Attack in CNNs by Training Set Corruption without Label
Poisoning" (ICIP; arXiv 1902.11237), section 3.1: image + amplitude sin(2 pi j frequency / width) in column j.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from unpoison.errors import InputError
from unpoison.threats._eight_bit import check_images
from unpoison.threats._trigger import Trigger


@final
@dataclass(frozen=True)
class SinusoidTrigger(Trigger, kind="sinusoid"):
    """Image + amplitude sin(2 pi j frequency / width) in column j, clipped to 8 bits.

    Arguments:
        amplitude: in 1/255, above 0 and at most 255; 40 as published.
        frequency: periods over the width, above 0; 6 as published. A frequency of half the width or a
            multiple of it gives no stripes.

    Raises:
        InputError: amplitude or frequency is out of range.

    >>> stamped = SinusoidTrigger(40, 2).stamp(torch.full((1, 1, 1, 8), 100, dtype=torch.uint8))
    >>> stamped.flatten().tolist()
    [100, 140, 100, 60, 100, 140, 100, 60]
    """

    amplitude: float = 40.0
    frequency: float = 6.0

    def __post_init__(self) -> None:
        if not 0 < self.amplitude <= 255:
            raise InputError(
                f"SinusoidTrigger: amplitude {self.amplitude} is outside (0, 255] (it is in 1/255)"
            )
        if not (self.frequency > 0 and math.isfinite(self.frequency)):
            raise InputError(f"SinusoidTrigger: frequency {self.frequency} must be above 0")

    def stamp(self, images: Tensor) -> Tensor:
        """The striped images UInt8[b c h w]."""
        _, _, width = check_images("sinusoid", images)
        columns = torch.arange(width, dtype=torch.float64) * (2 * math.pi * self.frequency / width)
        # Rounded on the CPU and added as integers, so that every device gives the same bytes.
        stripes = (self.amplitude * columns.sin()).round().to(images.device, torch.int16)
        return (images.to(torch.int16) + stripes).clamp_(0, 255).to(torch.uint8)
