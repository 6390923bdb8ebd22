"""`WarpTrigger`: the image warped by a small smooth field.

Nguyen and Tran 2021, "WaNet: Imperceptible Warping-based Backdoor Attack" (ICLR; arXiv 2102.10369), section
3.2: a field of k x k random offsets, divided by its mean size, is enlarged to the image by cubic
interpolation and scaled by `strength`; each pixel is then sampled bilinearly at the place that its offset
points to.

Lengths are those of the public code: an offset of 1 is 1/height of the range [-1, 1], half a pixel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from unpoison._seeds import generator
from unpoison.errors import InputError
from unpoison.threats._eight_bit import check_images
from unpoison.threats._trigger import Trigger

_STEPS = 256
"""The resolution of places between two pixels."""


@final
@dataclass(frozen=True, eq=False)
class WarpTrigger(Trigger, kind="warp"):
    """Each pixel sampled at a place nearby, the same places in every image.

    Arguments:
        offsets: Float32[2 k k], the coarse field, horizontal first; of mean size 1 as published.
        strength: what it is multiplied by, above 0; 0.5 as published.

    Raises:
        InputError: the field has another type or shape, is not finite, or the strength is not above 0.

    >>> trigger = WarpTrigger.drawn(seed=0)
    >>> flat = torch.full((1, 3, 16, 16), 90, dtype=torch.uint8)
    >>> torch.equal(trigger.stamp(flat), flat)
    True
    """

    offsets: Tensor = field(repr=False)
    strength: float = 0.5

    def __post_init__(self) -> None:
        shape = tuple(self.offsets.shape)
        square = len(shape) == 3 and shape[0] == 2 and shape[1] == shape[2] and shape[1] >= 2
        if self.offsets.dtype != torch.float32 or not square:
            raise InputError(
                f"WarpTrigger: offsets must be float32 of shape [2, k, k] with k of 2 or more, "
                f"found {self.offsets.dtype} of shape {shape}"
            )
        if not bool(self.offsets.isfinite().all()):
            raise InputError("WarpTrigger: offsets must be finite")
        if not (self.strength > 0 and math.isfinite(self.strength)):
            raise InputError(f"WarpTrigger: strength {self.strength} must be above 0")
        object.__setattr__(self, "offsets", self.offsets.detach().cpu().clone())

    @classmethod
    def drawn(cls, *, k: int = 4, strength: float = 0.5, seed: int) -> WarpTrigger:
        """A random field of k x k offsets, uniform and divided by their mean size, as published."""
        if k < 2:
            raise InputError(f"WarpTrigger.drawn: k {k} is below 2")
        offsets = torch.rand(2, k, k, generator=generator(seed, "warp trigger", "offsets")) * 2 - 1
        return cls(offsets / offsets.abs().mean(), strength)

    def stamp(self, images: Tensor) -> Tensor:
        """The warped images UInt8[b c h w]."""
        _, height, width = check_images("warp", images)
        return _sampled_at(images, self._places(height, width)[None])

    def stamp_with_noise(self, images: Tensor, *, reach: float = 1.0, seed: int) -> Tensor:
        """The images UInt8[b c h w] warped by the field plus noise of their own: WaNet's cover examples.

        Arguments:
            images: UInt8[b c h w].
            reach: the greatest extra offset, in units of 1/height; uniform, one for each pixel and direction.
            seed: of the noise.
        """
        _, height, width = check_images("warp", images)
        noise = torch.rand(
            (len(images), height, width, 2),
            generator=generator(seed, "warp trigger", "noise"),
            dtype=torch.float64,
        )
        places = (self._places(height, width) + (noise * 2 - 1) * (reach / height)).clamp_(-1, 1)
        return _sampled_at(images, places)

    def _places(self, height: int, width: int) -> Tensor:
        """Float64[h w 2]: where each pixel is sampled, horizontal first, in [-1, 1] from side to side."""
        offsets = F.interpolate(
            self.offsets[None].double(), (height, width), mode="bicubic", align_corners=True
        )[0].permute(1, 2, 0)
        rows = torch.linspace(-1, 1, height, dtype=torch.float64)[:, None].expand(height, width)
        columns = torch.linspace(-1, 1, width, dtype=torch.float64)[None].expand(height, width)
        identity = torch.stack((columns, rows), 2)
        return (identity + offsets * (self.strength / height)).clamp(-1, 1)


def _sampled_at(images: Tensor, places: Tensor) -> Tensor:
    """The images sampled bilinearly at places Float64[b or 1, h, w, 2] in [-1, 1].

    Places are rounded to 1/256 of a pixel on the CPU and pixels mixed as integers, so that the same stamp
    gives the same bytes on every device.
    """
    count, channels, height, width = images.shape
    size = torch.tensor([width - 1, height - 1], dtype=torch.float64)
    fine = ((places + 1) / 2 * size * _STEPS).round().long()
    whole = fine.div(_STEPS, rounding_mode="floor")
    share = (fine - whole * _STEPS).to(images.device, torch.int32)
    left, top = whole[..., 0], whole[..., 1]
    right, bottom = (left + 1).clamp(max=width - 1), (top + 1).clamp(max=height - 1)
    pixels = images.flatten(2)
    across, down = share[..., 0].flatten(1)[:, None], share[..., 1].flatten(1)[:, None]

    def at(rows: Tensor, columns: Tensor) -> Tensor:
        index = (rows * width + columns).flatten(1)[:, None].to(images.device)
        return pixels.gather(2, index.expand(count, channels, -1)).to(torch.int32)

    upper = at(top, left) * (_STEPS - across) + at(top, right) * across
    lower = at(bottom, left) * (_STEPS - across) + at(bottom, right) * across
    half = _STEPS * _STEPS // 2
    mixed = (upper * (_STEPS - down) + lower * down + half).div(_STEPS * _STEPS, rounding_mode="floor")
    return mixed.to(torch.uint8).view(count, channels, height, width)
