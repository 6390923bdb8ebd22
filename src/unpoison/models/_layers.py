"""Layers that several architectures share."""

from __future__ import annotations

from typing import final

import torch.nn.functional as F
from torch import Tensor, nn


@final
class ConvBNReLU(nn.Module):
    """Convolution without bias, batch norm, ReLU.

    The ReLU is not in place, so that features read at `norm` are what the norm computed.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, kernel_size: int = 3) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=False
        )
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, images: Tensor) -> Tensor:
        """Float[b c h w] to Float[b out h/stride w/stride]."""
        return F.relu(self.norm(self.convolution(images)))


def global_average_pool(maps: Tensor) -> Tensor:
    """Float[b c h w] to Float[b c]."""
    return maps.mean((2, 3))


def global_max_pool(maps: Tensor) -> Tensor:
    """Float[b c h w] to Float[b c]; unlike adaptive max-pooling its gradient is deterministic on CUDA."""
    return maps.amax((2, 3))
