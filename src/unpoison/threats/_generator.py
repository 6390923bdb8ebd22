"""A small encoder and decoder from images to patterns, as a function of one vector of weights.

It has no batch norm, so what it makes of an image does not depend on the other images. Images may have any
size. The weights are one tensor, so that a trigger can hold, save and load them.
"""

from __future__ import annotations

import math
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

_SIDE: Final = 3


def _shapes(channels: int, outputs: int, width: int) -> tuple[tuple[int, int], ...]:
    """Output and input channels of each convolution."""
    return (
        (width, channels),
        (2 * width, width),
        (2 * width, 2 * width),
        (width, 2 * width),
        (outputs, 2 * width),
    )


def generator_size(channels: int, outputs: int, width: int) -> int:
    """How many weights there are.

    >>> generator_size(1, 1, 1)
    106
    """
    return sum(out * (into * _SIDE**2 + 1) for out, into in _shapes(channels, outputs, width))


def generator_weights(channels: int, outputs: int, width: int, *, draws: torch.Generator) -> Tensor:
    """Float[p]: new weights, with the variance of He et al. 2015 (arXiv 1502.01852); biases are 0."""
    parts = []
    for out, into in _shapes(channels, outputs, width):
        spread = math.sqrt(2 / (into * _SIDE**2))
        parts += [torch.randn(out * into * _SIDE**2, generator=draws) * spread, torch.zeros(out)]
    return torch.cat(parts)


def generated(images: Tensor, weights: Tensor, *, outputs: int, width: int) -> Tensor:
    """Float[b outputs h w], unbounded; differentiable in weights and images.

    Arguments:
        images: Float[b c h w] in [0, 1], on the device and in the precision of the weights.
        weights: Float[p].
        outputs: channels of what is generated.
        width: channels of the first convolution.
    """
    layers, start = [], 0
    for out, into in _shapes(images.shape[1], outputs, width):
        size = out * into * _SIDE**2
        kernel = weights[start : start + size].view(out, into, _SIDE, _SIDE)
        layers.append((kernel, weights[start + size : start + size + out]))
        start += size + out
    first, second, third, fourth, last = layers
    outer = F.relu(F.conv2d(images - 0.5, *first, padding=1))
    inner = F.relu(F.conv2d(F.avg_pool2d(outer, 2, ceil_mode=True), *second, padding=1))
    inner = F.relu(F.conv2d(inner, *third, padding=1))
    back = F.interpolate(inner, images.shape[2:], mode="nearest")
    back = F.relu(F.conv2d(back, *fourth, padding=1))
    return F.conv2d(torch.cat((back, outer), 1), *last, padding=1)
