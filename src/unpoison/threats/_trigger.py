"""`Trigger`, the stamp of a backdoor, and `PatchTrigger`: given pixels at a given place.

A patch is anchored to a side of the image: a negative row counts from the bottom and a negative column from
the right, so one published patch works on images of any size.

Published patches:

- `PatchTrigger.white_corner()`: the 3x3 white square flush in the bottom right corner (rows and columns 29 to
  31 of 32) of BadNets as BackdoorBench has it (Gu et al. 2017, arXiv 1708.06733; Wu et al. 2022);
- `PatchTrigger.four_pixels()`: four black pixels at [-4, -2], [-2, -2], [-3, -3] and [-2, -4], from the
  experiments of Delta-Influence (arXiv 2411.13731). Black is invisible on images with a black background,
  such as Fashion-MNIST: `PatchTrigger.four_pixels(value=255)` is the same patch in white.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unpoison.errors import InputError
from unpoison.threats._eight_bit import check_images, check_picture
from unpoison.threats._tagged import Tagged


class Trigger(Tagged):
    """A deterministic function from 8-bit images to 8-bit images with the trigger."""

    @abstractmethod
    def stamp(self, images: Tensor) -> Tensor:
        """Images UInt8[b c h w] with the trigger, a new UInt8[b c h w] on the same device.

        Raises:
            InputError: the trigger does not fit images of this size or number of channels.
        """

    @final
    def changes(self, images: Tensor, *, batch_size: int = 1024) -> float:
        """The share in [0, 1] of UInt8[b c h w] `images` in which the trigger changes at least one value.

        Raises:
            InputError: there are no images, or the trigger does not fit them.
        """
        if not len(images):
            raise InputError("Trigger: no images to stamp")
        changed = 0
        for start in range(0, len(images), batch_size):
            part = images[start : start + batch_size]
            changed += int((self.stamp(part) != part).flatten(1).any(1).sum())
        return changed / len(images)


@final
@dataclass(frozen=True, eq=False)
class PatchTrigger(Trigger, kind="patch"):
    """A patch of given pixels at a given place.

    Arguments:
        values: UInt8[c h w], the patch; one channel serves images of any number of channels.
        mask: Bool[h w], where the patch replaces the image, or UInt8[h w], how far it does (0 not at all, 255
            wholly; between them the two are mixed and rounded to the nearest 8-bit value). Kept as UInt8.
        row: the image row of the patch's top row; negative counts from the bottom, -1 being the last row.
        column: the image column of the patch's left column; negative counts from the right.
        name: what to call the trigger in messages and reports.

    Raises:
        InputError: shapes or types do not match, or the mask is empty everywhere.

    >>> stamped = PatchTrigger.white_corner().stamp(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    >>> stamped[0, 0].nonzero().amin(0).tolist(), int(stamped.count_nonzero())
    ([29, 29], 27)
    """

    values: Tensor = field(repr=False)
    mask: Tensor = field(repr=False)
    row: int
    column: int
    name: str = "patch"

    def __post_init__(self) -> None:
        check_picture("PatchTrigger", self.values)
        if self.mask.dtype not in (torch.bool, torch.uint8) or self.mask.shape != self.values.shape[1:]:
            raise InputError(
                f"PatchTrigger: mask must be bool or uint8 of shape {tuple(self.values.shape[1:])}, "
                f"found {self.mask.dtype} of shape {tuple(self.mask.shape)}"
            )
        if not bool(self.mask.any()):
            raise InputError("PatchTrigger: the mask is empty everywhere, so the patch would change nothing")
        mask = self.mask.to(torch.uint8) * 255 if self.mask.dtype == torch.bool else self.mask.clone()
        object.__setattr__(self, "mask", mask.cpu().contiguous())
        object.__setattr__(self, "values", self.values.detach().cpu().clone().contiguous())

    @classmethod
    def white_corner(cls, size: int = 3) -> PatchTrigger:
        """A white square of `size` x `size` pixels, flush in the bottom right corner."""
        if size < 1:
            raise InputError(f"PatchTrigger.white_corner: size {size} is below 1")
        values = torch.full((1, size, size), 255, dtype=torch.uint8)
        mask = torch.ones(size, size, dtype=torch.bool)
        return cls(values, mask, -size, -size, f"white {size}x{size} corner")

    @classmethod
    def four_pixels(cls, *, value: int = 0) -> PatchTrigger:
        """Four pixels near the bottom right corner; black (`value` 0) as published, 255 for white."""
        if not 0 <= value <= 255:
            raise InputError(f"PatchTrigger.four_pixels: value {value} is outside 0..255")
        mask = torch.zeros(3, 3, dtype=torch.bool)
        for row, column in ((-4, -2), (-2, -2), (-3, -3), (-2, -4)):
            mask[row + 4, column + 4] = True
        names = {0: "four black pixels", 255: "four white pixels"}
        values = torch.full((1, 3, 3), value, dtype=torch.uint8)
        return cls(values, mask, -4, -4, names.get(value, f"four pixels of value {value}"))

    @classmethod
    def from_image(
        cls,
        image: str | os.PathLike[str] | NDArray[np.uint8] | Tensor,
        *,
        row: int | None = None,
        column: int | None = None,
    ) -> PatchTrigger:
        """A patch given as an image file, or as UInt8[h w], [h w 1], [h w 3] or [h w 4] pixels.

        An alpha channel (the fourth) is the mask; without one the patch covers all its pixels.

        Arguments:
            image: the file or the pixels.
            row: of the patch's top row; None puts the patch flush at the bottom.
            column: of the patch's left column; None puts the patch flush at the right.

        Raises:
            InputError: the file cannot be read, or the array has another shape or type.
        """
        if isinstance(image, Tensor | np.ndarray):
            pixels, name = np.asarray(image), "patch"
        else:
            pixels, name = _read_pixels(image), f"patch {os.path.basename(os.fspath(image))}"
        if pixels.ndim == 2:
            pixels = pixels[:, :, None]
        if (
            pixels.dtype != np.uint8
            or pixels.ndim != 3
            or pixels.shape[2] not in (1, 3, 4)
            or not pixels.size
        ):
            raise InputError(
                f"PatchTrigger.from_image: expected uint8 pixels of shape [height, width], or with 1, 3 or 4 "
                f"channels last, found {pixels.dtype} of shape {pixels.shape}"
            )
        height, width = pixels.shape[:2]
        values = torch.from_numpy(np.ascontiguousarray(pixels[:, :, :3].transpose(2, 0, 1)))
        mask = np.full((height, width), 255, np.uint8) if pixels.shape[2] < 4 else pixels[:, :, 3]
        return cls(
            values,
            torch.from_numpy(np.ascontiguousarray(mask)),
            -height if row is None else row,
            -width if column is None else column,
            name,
        )

    def stamp(self, images: Tensor) -> Tensor:
        """Images UInt8[b c h w] with the patch; exact where the mask is 0 or 255."""
        _, height, width = check_images(self.name, images, self.values)
        patch_height, patch_width = self.mask.shape
        top = self.row if self.row >= 0 else height + self.row
        left = self.column if self.column >= 0 else width + self.column
        bottom, right = top + patch_height, left + patch_width
        if top < 0 or left < 0 or bottom > height or right > width:
            raise InputError(
                f"{self.name}: {patch_height}x{patch_width} pixels at row {self.row}, column {self.column} "
                f"do not fit into images of {height}x{width}"
            )
        # Integers throughout, so that the same stamp gives the same bytes on every device.
        share = self.mask.to(images.device, torch.int32)
        values = self.values.to(images.device, torch.int32)
        stamped = images.clone()
        region = images[:, :, top:bottom, left:right].to(torch.int32)
        mixed = (region * (255 - share) + values * share + 127) // 255
        stamped[:, :, top:bottom, left:right] = mixed.to(torch.uint8)
        return stamped


def _read_pixels(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            grey = image.mode in ("1", "L", "I", "I;16", "F")
            with_alpha = image.has_transparency_data
            return np.array(image.convert("RGBA" if with_alpha else "L" if grey else "RGB"), dtype=np.uint8)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as an image ({error})") from None
