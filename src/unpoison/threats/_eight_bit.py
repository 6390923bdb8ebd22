"""What every trigger asks of the images it is given, said once."""

from __future__ import annotations

import torch
from torch import Tensor

from unpoison.errors import InputError


def check_images(name: str, images: Tensor) -> tuple[int, int, int]:
    """Channels, height and width of UInt8[b c h w] `images`.

    Raises:
        InputError: they are something else.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise InputError(
            f"{name}: images must be uint8 of shape [n, channels, height, width], "
            f"found {images.dtype} of shape {tuple(images.shape)}"
        )
    channels, height, width = images.shape[1:]
    return channels, height, width


def check_overlay(name: str, overlay: Tensor, images: Tensor) -> None:
    """That an overlay [c h w] is as large as the images and has one channel or theirs.

    Raises:
        InputError: it is not.
    """
    channels, height, width = check_images(name, images)
    if overlay.shape[0] not in (1, channels) or tuple(overlay.shape[1:]) != (height, width):
        raise InputError(
            f"{name}: is made for images of shape {tuple(overlay.shape)}, found {(channels, height, width)}; "
            f"give one of {height}x{width} pixels with 1 or {channels} channels"
        )
