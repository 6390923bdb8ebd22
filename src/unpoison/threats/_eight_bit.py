"""Checks of the images that triggers are given."""

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


def check_channels(name: str, patch: Tensor, channels: int) -> None:
    """Check that a patch [c h w] has one channel, or as many as the images.

    Raises:
        InputError: it has not.
    """
    if patch.shape[0] not in (1, channels):
        raise InputError(
            f"{name}: the patch has {patch.shape[0]} channels and the images have {channels}; "
            f"give a patch of 1 or {channels}"
        )


def check_picture(name: str, values: Tensor) -> None:
    """Check that the values of a trigger are UInt8[c h w] and not empty.

    Raises:
        InputError: they are something else.
    """
    if values.dtype != torch.uint8 or values.ndim != 3 or not values.numel():
        raise InputError(
            f"{name}: values must be uint8 of shape [channels, height, width], "
            f"found {values.dtype} of shape {tuple(values.shape)}"
        )


def check_overlay(name: str, overlay: Tensor, images: Tensor) -> None:
    """Check that an overlay [c h w] is as large as the images and has one channel, or as many as they.

    Raises:
        InputError: it is not.
    """
    channels, height, width = check_images(name, images)
    if overlay.shape[0] not in (1, channels) or tuple(overlay.shape[1:]) != (height, width):
        raise InputError(
            f"{name}: is made for images of shape {tuple(overlay.shape)}, found {(channels, height, width)}; "
            f"give one of {height}x{width} pixels with 1 or {channels} channels"
        )
