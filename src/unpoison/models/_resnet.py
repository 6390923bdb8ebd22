"""ResNet-18 and ResNet-20, networks of basic blocks (He, Zhang, Ren and Sun 2016).

ResNet-18: four stages of two blocks with w, 2w, 4w, 8w channels, w = 64. The CIFAR stem is a 3x3 convolution
without pooling (11,173,962 parameters for 10 classes, as in poisoning-gradient-matching and EPIC); the
ImageNet stem is a 7x7 convolution of stride 2 and a 3x3 max-pool of stride 2.

ResNet-20: three stages of three blocks with w, 2w, 4w channels, w = 16, shortcuts by 1x1 convolution and
batch norm as in MetaPoison's code (272,474 parameters for 10 classes).
"""

from __future__ import annotations

from typing import final

import torch.nn.functional as F
from torch import Tensor, nn

from unpoison.models._layers import ConvBNReLU, global_average_pool


@final
class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, added to the input or to its 1x1 projection, then ReLU."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        self.first = ConvBNReLU(in_channels, out_channels, stride=stride)
        self.convolution = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, maps: Tensor) -> Tensor:
        """Float[b c h w] to Float[b out h/stride w/stride]."""
        return F.relu(self.norm(self.convolution(self.first(maps))) + self.shortcut(maps))


@final
class ResNet(nn.Module):
    """Float[b c h w] to logits Float[b classes].

    Arguments:
        num_classes: how many logits.
        in_channels: channels of the images.
        width: channels of the stem.
        blocks: blocks of each stage; from the second stage on the first block halves the resolution.
        imagenet_stem: 7x7 convolution of stride 2 and pooling instead of a 3x3 convolution.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        width: int,
        blocks: tuple[int, ...],
        imagenet_stem: bool = False,
    ) -> None:
        super().__init__()
        self.stem: nn.Module = (
            nn.Sequential(
                ConvBNReLU(in_channels, width, kernel_size=7, stride=2), nn.MaxPool2d(3, stride=2, padding=1)
            )
            if imagenet_stem
            else ConvBNReLU(in_channels, width)
        )
        self.stages = nn.ModuleList()
        channels = width
        for stage, count in enumerate(blocks):
            layers = []
            for block in range(count):
                out_channels = width << stage
                layers.append(BasicBlock(channels, out_channels, stride=2 if stage > 0 and block == 0 else 1))
                channels = out_channels
            self.stages.append(nn.Sequential(*layers))
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits Float[b classes]."""
        maps = self.stem(images)
        for stage in self.stages:
            maps = stage(maps)
        logits: Tensor = self.classifier(global_average_pool(maps))
        return logits
