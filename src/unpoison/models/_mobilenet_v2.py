"""MobileNetV2 with strides for CIFAR (Sandler et al. 2018), as in the poisoning benchmark.

Seven groups of inverted residual blocks: 1x1 expansion, 3x3 depthwise convolution, linear 1x1 projection.
Unlike in the network for ImageNet, the stem, the second group and the fourth keep their resolution. Published
results were measured on the benchmark's variant, so this one projects the shortcut by a 1x1 convolution where
the channels change at stride 1, expands even by a factor of one, and has ReLU in place of ReLU6: 2,296,922
parameters for 10 classes.
"""

from __future__ import annotations

from typing import Final, final

import torch.nn.functional as F
from torch import Tensor, nn

from unpoison.models._layers import ConvBNReLU, global_average_pool

# Expansion, output channels at width 32, blocks, stride of the first block.
GROUPS: Final = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


@final
class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, projection; plus the shortcut where the resolution is kept."""

    def __init__(self, in_channels: int, out_channels: int, *, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = expansion * in_channels
        self.expand = ConvBNReLU(in_channels, hidden, kernel_size=1)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1, groups=hidden, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(hidden)
        self.project = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.project_norm = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module | None = None
        if stride == 1:
            self.shortcut = (
                nn.Identity()
                if in_channels == out_channels
                else nn.Sequential(
                    nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
                )
            )

    def forward(self, maps: Tensor) -> Tensor:
        """Float[b c h w] to Float[b out h/stride w/stride]."""
        hidden = F.relu(self.depthwise_norm(self.depthwise(self.expand(maps))))
        out: Tensor = self.project_norm(self.project(hidden))
        return out if self.shortcut is None else out + self.shortcut(maps)


@final
class MobileNetV2(nn.Module):
    """Float[b c h w] to logits Float[b classes].

    Arguments:
        num_classes: how many logits.
        in_channels: channels of the images.
        width: channels of the stem; all other channels scale by width / 32 (at least one each).
    """

    def __init__(self, *, num_classes: int, in_channels: int, width: int = 32) -> None:
        super().__init__()

        def scaled(channels: int) -> int:
            return max(1, round(channels * width / 32))

        self.stem = ConvBNReLU(in_channels, width)
        layers: list[nn.Module] = []
        channels = width
        for expansion, published, blocks, stride in GROUPS:
            for block in range(blocks):
                layers.append(
                    InvertedResidual(
                        channels, scaled(published), expansion=expansion, stride=stride if block == 0 else 1
                    )
                )
                channels = scaled(published)
        self.blocks = nn.Sequential(*layers)
        self.last = ConvBNReLU(channels, scaled(1280), kernel_size=1)
        self.classifier = nn.Linear(scaled(1280), num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits Float[b classes]."""
        logits: Tensor = self.classifier(global_average_pool(self.last(self.blocks(self.stem(images)))))
        return logits
