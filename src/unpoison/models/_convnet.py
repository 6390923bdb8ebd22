"""ConvNet and ConvNetBN, the small networks of MetaPoison (Huang et al. 2020; "6-layer", after MAML).

Five times [3x3 convolution, (batch norm), ReLU, 2x2 max-pool] with w, 2w, 2w, 4w, 4w channels (w = 16 as
published), then one linear layer. Xavier initialisation. With batch norm, 10 classes and 32x32 colour images:
70,618 parameters and about 2.65 million multiply-adds an image.
"""

from __future__ import annotations

import itertools
import math
from typing import final

import torch.nn.functional as F
from torch import Tensor, nn


@final
class ConvNet(nn.Module):
    """Float[b c h w] to logits Float[b classes].

    Arguments:
        num_classes: how many logits.
        in_channels: channels of the images.
        image_size: height and width of the images, 8 or more; pooling rounds up.
        width: channels of the first convolution.
        batch_norm: norm after each convolution, which then has no bias.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        image_size: tuple[int, int],
        width: int = 16,
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        channels = (in_channels, width, 2 * width, 2 * width, 4 * width, 4 * width)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=not batch_norm)
            for fan_in, fan_out in itertools.pairwise(channels)
        )
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(fan_out) if batch_norm else nn.Identity() for fan_out in channels[1:]
        )
        positions = math.prod(math.ceil(side / 32) for side in image_size)
        self.classifier = nn.Linear(channels[-1] * positions, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights and zero biases (`reinitialized` calls this after the layers' own)."""
        for module in (*self.convolutions, self.classifier):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits Float[b classes]."""
        maps = images
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            # The ReLU is monotone, so pooling first gives the same values with a quarter of the work.
            maps = F.relu(F.max_pool2d(norm(convolution(maps)), 2, ceil_mode=True))
        logits: Tensor = self.classifier(maps.flatten(1))
        return logits
