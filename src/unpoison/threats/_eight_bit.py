"""Checks of the images that triggers are given; what does not fit is an `InputError`."""

from __future__ import annotations

import torch
from torch import Tensor

from unpoison.errors import InputError


def check_images(name: str, images: Tensor, patch: Tensor | None = None) -> tuple[int, int, int]:
    """Channels, height and width of UInt8[b c h w] images, which a patch [1 or c, ...] must fit."""
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise InputError(
            f"{name}: images must be uint8 of shape [n, channels, height, width], "
            f"found {images.dtype} of shape {tuple(images.shape)}"
        )
    channels, height, width = images.shape[1:]
    if patch is not None and patch.shape[0] not in (1, channels):
        raise InputError(
            f"{name}: the patch has {patch.shape[0]} channels and the images have {channels}; "
            f"give a patch of 1 or {channels}"
        )
    return channels, height, width


def check_picture(name: str, values: Tensor) -> None:
    """Check that the values of a trigger are UInt8[c h w] and not empty."""
    if values.dtype != torch.uint8 or values.ndim != 3 or not values.numel():
        raise InputError(
            f"{name}: values must be uint8 of shape [channels, height, width], "
            f"found {values.dtype} of shape {tuple(values.shape)}"
        )


def check_overlay(name: str, overlay: Tensor, images: Tensor) -> None:
    """Check that an overlay [c h w] is as large as the images and has one channel, or as many as they."""
    channels, height, width = check_images(name, images)
    if overlay.shape[0] not in (1, channels) or tuple(overlay.shape[1:]) != (height, width):
        raise InputError(
            f"{name}: is made for images of shape {tuple(overlay.shape)}, found {(channels, height, width)}; "
            f"give one of {height}x{width} pixels with 1 or {channels} channels"
        )
