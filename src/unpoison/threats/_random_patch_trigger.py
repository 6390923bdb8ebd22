"""`RandomPatchTrigger`: a patch at a random place in every image.

Souri, Fowl, Chellappa, Goldblum and Goldstein 2022, "Sleeper Agent" (NeurIPS; arXiv 2106.08970) and Saha,
Subramanya and Pirsiavash 2020, "Hidden Trigger Backdoor Attacks" (AAAI; arXiv 1910.00033) put the patch at a
random place in each image, in training and in testing.

Here the place is a hash of the image's pixels, so that stamping is a function: the same image always gets the
same place, on every device, alone or in a batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from unpoison._seeds import generator
from unpoison.errors import InputError
from unpoison.threats._eight_bit import check_images, check_picture
from unpoison.threats._trigger import Trigger

_PRIME = 2**31 - 1


@final
@dataclass(frozen=True, eq=False)
class RandomPatchTrigger(Trigger, kind="random-patch"):
    """A patch of given pixels, at a place that is a hash of the image.

    Arguments:
        values: UInt8[c h w], the patch; one channel serves images of any number of channels.
        seed: of the hash; another seed gives other places.
        name: what to call the trigger in messages and reports.

    Raises:
        InputError: the patch is not UInt8[c h w].

    >>> trigger = RandomPatchTrigger.coloured(2, seed=0)
    >>> images = torch.arange(2 * 3 * 8 * 8).to(torch.uint8).view(2, 3, 8, 8)
    >>> torch.equal(trigger.stamp(images)[1:], trigger.stamp(images[1:]))
    True
    """

    values: Tensor = field(repr=False)
    seed: int = 0
    name: str = "random patch"

    def __post_init__(self) -> None:
        check_picture("RandomPatchTrigger", self.values)
        object.__setattr__(self, "values", self.values.detach().cpu().clone())

    @classmethod
    def coloured(cls, size: int = 8, *, channels: int = 3, seed: int) -> RandomPatchTrigger:
        """Blocks of random colour, a quarter of the side each, like the public triggers of these attacks.

        Arguments:
            size: the side of the patch in pixels; 8 as published for CIFAR-10.
            channels: of the patch; 1 for grey images.
            seed: of the colours and of the places.
        """
        if size < 1:
            raise InputError(f"RandomPatchTrigger.coloured: size {size} is below 1")
        blocks = torch.randint(
            2, (channels, 4, 4), generator=generator(seed, "random patch trigger", "colours")
        )
        blocks[:, 0, 0] = 1  # never black all over
        nearest = torch.arange(size) * 4 // size
        values = (blocks[:, nearest][:, :, nearest] * 255).to(torch.uint8)
        return cls(values, seed, f"coloured {size}x{size} patch")

    def places(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Int64[b] rows and Int64[b] columns of the patch's top left pixel in UInt8[b c h w] images.

        Raises:
            InputError: the patch does not fit images of this size or number of channels.
        """
        channels, height, width = check_images(self.name, images, self.values)
        _, patch_height, patch_width = self.values.shape
        if patch_height > height or patch_width > width:
            raise InputError(
                f"{self.name}: {patch_height}x{patch_width} pixels do not fit into images of {height}x{width}"
            )
        # A sum of pixels times pseudo-random weights modulo a prime: integers, and never above 2**63.
        pixels = channels * height * width
        order = torch.arange(1, pixels + 1, dtype=torch.int64)
        weights = (order * 48271 % _PRIME) * (order + self.seed % 65521 + 7919) % _PRIME
        weights = weights.to(images.device)
        chunk = max(1, 2**24 // pixels)
        sums = [(part.flatten(1).long() * weights % _PRIME).sum(1) for part in torch.split(images, chunk)]
        drawn = torch.cat(sums) % _PRIME if sums else torch.zeros(0, dtype=torch.int64, device=images.device)
        drawn = drawn * 69621 % _PRIME
        free_rows, free_columns = height - patch_height + 1, width - patch_width + 1
        place = drawn % (free_rows * free_columns)
        return place.div(free_columns, rounding_mode="floor"), place % free_columns

    def stamp(self, images: Tensor) -> Tensor:
        """The images UInt8[b c h w] with the patch, each at its own place."""
        rows, columns = self.places(images)
        channels = images.shape[1]
        _, patch_height, patch_width = self.values.shape
        stamped = images.clone()
        inside_rows = rows[:, None] + torch.arange(patch_height, device=images.device)
        inside_columns = columns[:, None] + torch.arange(patch_width, device=images.device)
        image = torch.arange(len(images), device=images.device)[:, None, None, None]
        channel = torch.arange(channels, device=images.device)[None, :, None, None]
        values = self.values.to(images.device).expand(channels, patch_height, patch_width)
        stamped[image, channel, inside_rows[:, None, :, None], inside_columns[:, None, None, :]] = values
        return stamped
