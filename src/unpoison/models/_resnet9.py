"""ResNet-9, the fast network of the DAWNBench entries (Page 2018), of any width.

    preparation   w   conv-bn-relu
    stage 1       2w  conv, 2x2 max-pool, bn, relu, residual (two conv-bn-relu)
    stage 2       4w  conv, 2x2 max-pool, bn, relu
    stage 3       8w  conv, 2x2 max-pool, bn, relu, residual (two conv-bn-relu)
    head              global max-pool, linear

w = 64 as published; pooling before the norm, which saves three quarters of its work, is Page's own later
order. Departures: the last pooling is global for every image size, the linear layer has a bias, and the
constant factor 1/8 on the logits is left out, since with weight decay and batch norm the last layer learns
its scale.
"""

from __future__ import annotations

from typing import final

import torch.nn.functional as F
from torch import Tensor, nn

from unpoison.models._layers import ConvBNReLU, global_max_pool


@final
class PooledStage(nn.Module):
    """Convolution, 2x2 max-pool, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, maps: Tensor) -> Tensor:
        """Float[b c h w] to Float[b out h/2 w/2]."""
        return F.relu(self.norm(F.max_pool2d(self.convolution(maps), 2)))


@final
class Residual(nn.Module):
    """x + two conv-bn-relu of x."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = ConvBNReLU(channels, channels)
        self.second = ConvBNReLU(channels, channels)

    def forward(self, maps: Tensor) -> Tensor:
        """Float[b c h w] to the same shape."""
        out: Tensor = maps + self.second(self.first(maps))
        return out


@final
class ResNet9(nn.Module):
    """Float[b c h w] to logits Float[b classes]; height and width at least 8.

    Arguments:
        num_classes: how many logits.
        in_channels: channels of the images.
        width: channels of the first convolution.
    """

    def __init__(self, *, num_classes: int, in_channels: int, width: int = 64) -> None:
        super().__init__()
        self.preparation = ConvBNReLU(in_channels, width)
        self.stage1 = PooledStage(width, 2 * width)
        self.residual1 = Residual(2 * width)
        self.stage2 = PooledStage(2 * width, 4 * width)
        self.stage3 = PooledStage(4 * width, 8 * width)
        self.residual3 = Residual(8 * width)
        self.classifier = nn.Linear(8 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits Float[b classes]."""
        maps = self.residual1(self.stage1(self.preparation(images)))
        maps = self.residual3(self.stage3(self.stage2(maps)))
        logits: Tensor = self.classifier(global_max_pool(maps))
        return logits
