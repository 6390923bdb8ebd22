"""Batched augmentation of tensors: flip, reflect-padded crop and cutout.

Every image of the batch gets its own draws. Crop and flip are one gather from the unpadded batch, by the flat
index of the source of each output pixel, with indices beyond the border reflected. So there is no padded
copy, uint8 stays uint8, and gradients flow to float images. Cost: one read and one write of the batch; under
1 ms for 512 images of 3x32x32 uint8 on one CPU core.

Crop and flip are those of He et al., "Deep Residual Learning for Image Recognition" (2016), section 4.2, with
the padding reflected instead of black; cutout is that of DeVries and Taylor, "Improved Regularization of
Convolutional Neural Networks with Cutout" (2017), section 3.2: the centre is uniform over the image and the
square is clipped at the border.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unpoison.errors import InputError


def augment(
    images: Tensor,
    *,
    flip: bool = False,
    crop_padding: int = 0,
    cutout: int = 0,
    cutout_fill: float | Sequence[float] = 0.0,
    generator: torch.Generator,
) -> Tensor:
    """Draw an augmented copy of every image.

    Arguments:
        images: UInt8[n c h w] in 0..255 or Float[n c h w] in [0, 1], on any device.
        flip: mirror each image left to right with probability 1/2.
        crop_padding: reflect-pad by so many pixels and cut out a window of the old size at a uniform place; 0
            is off, and it must be less than the height and the width.
        cutout: side in pixels of a square that is filled, its centre uniform over the image; 0 is off.
        cutout_fill: the value of the square, one number or one a channel, in [0, 1] also for uint8 images.
            Black by default; the paper's is the mean colour (`TrainingSet.channel_statistics`).
        generator: on the device of the images or on the CPU. A CPU generator gives the same augmentation on
            every device.

    Returns:
        A tensor of the shape, type and device of `images`; `images` itself without augmentation.

    Raises:
        InputError: `images` is not a batch of images, or a number is out of range.

    >>> images = torch.arange(9, dtype=torch.uint8).reshape(1, 1, 3, 3)
    >>> augment(images, crop_padding=1, generator=torch.Generator().manual_seed(4)).shape
    torch.Size([1, 1, 3, 3])
    """
    if images.ndim != 4:
        raise InputError(
            f"augment: images must have shape [n, channels, height, width], found {tuple(images.shape)}"
        )
    n, channels, height, width = images.shape
    if crop_padding < 0 or (crop_padding and crop_padding >= min(height, width)):
        raise InputError(
            f"augment: crop_padding {crop_padding} must be at least 0 and less than the image size "
            f"{height}x{width}"
        )
    if cutout < 0:
        raise InputError(f"augment: cutout {cutout} must be at least 0")
    device = images.device

    rows = torch.arange(height, device=device).expand(n, height)
    columns = torch.arange(width, device=device).expand(n, width)
    if crop_padding:
        shifts = torch.randint(2 * crop_padding + 1, (2, n, 1), generator=generator, device=generator.device)
        shifts = shifts.to(device) - crop_padding
        rows, columns = _reflected(rows + shifts[0], height), _reflected(columns + shifts[1], width)
    if flip:
        mirrored = torch.randint(2, (n, 1), generator=generator, device=generator.device).to(
            device, torch.bool
        )
        columns = torch.where(mirrored, columns.flip(1), columns)
    if crop_padding or flip:
        positions = (rows[:, :, None] * width + columns[:, None, :]).reshape(n, 1, height * width)
        flat = images.reshape(n, channels, height * width)
        images = flat.gather(2, positions.expand(n, channels, height * width)).reshape(
            n, channels, height, width
        )
    if cutout:
        centres = torch.rand((2, n, 1), generator=generator, device=generator.device).to(device)
        inside_rows = _inside(centres[0], height, cutout)
        inside_columns = _inside(centres[1], width, cutout)
        hole = (inside_rows[:, :, None] & inside_columns[:, None, :])[:, None]
        images = torch.where(hole, _fill(cutout_fill, images), images)
    return images


def _reflected(positions: Tensor, size: int) -> Tensor:
    """Positions in -(size-1)..2(size-1) reflected into 0..size-1, without repeating the border pixel."""
    return (size - 1) - ((size - 1) - positions.abs()).abs()


def _inside(centre: Tensor, size: int, side: int) -> Tensor:
    """Bool[n size]: which positions lie within `side` pixels around the one drawn by `centre` in [0, 1)."""
    start = (centre * size).long().clamp_(max=size - 1) - side // 2
    positions = torch.arange(size, device=centre.device)
    return (positions >= start) & (positions < start + side)


def _fill(value: float | Sequence[float], images: Tensor) -> Tensor:
    """The filling as a tensor of the images' type that broadcasts over them."""
    numbers = [float(value)] if isinstance(value, int | float) else [float(number) for number in value]
    if len(numbers) not in (1, images.shape[1]) or not all(0 <= number <= 1 for number in numbers):
        raise InputError(
            f"augment: cutout_fill must be one number in [0, 1], or one for each of {images.shape[1]} "
            f"channels, found {value}"
        )
    if not images.is_floating_point():
        numbers = [round(number * 255) for number in numbers]
    return torch.tensor(numbers, dtype=images.dtype, device=images.device).reshape(1, -1, 1, 1)
