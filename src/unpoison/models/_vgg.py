"""VGG-11, VGG-13 and VGG-16 for small images (Simonyan and Zisserman 2015, configurations A, B, D).

3x3 convolutions in five groups of w, 2w, 4w, 8w, 8w channels (w = 64), a 2x2 max-pool after each group, then
a single linear layer instead of the three of the network for ImageNet. With batch norm: global average
pooling before the linear layer (the networks of the poisoning benchmark, less their convolution biases, which
batch norm makes redundant). Without (`vgg13-plain`): the network of MetaPoison, global max pooling and a
linear layer drawn from N(0, 0.01); its convolutions are Kaiming-initialised here.
"""

from __future__ import annotations

from typing import Final, final

import torch.nn.functional as F
from torch import Tensor, nn

from unpoison.models._layers import ConvBNReLU, global_average_pool, global_max_pool

VGG_GROUPS: Final = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3)}


@final
class VGG(nn.Module):
    """Float[b c h w] to logits Float[b classes]; height and width at least 8, pooling rounds up.

    Arguments:
        num_classes: how many logits.
        in_channels: channels of the images.
        width: channels of the first group.
        depth: 11, 13 or 16.
        batch_norm: norm after each convolution, average pooling at the end; otherwise neither.
    """

    def __init__(
        self, *, num_classes: int, in_channels: int, width: int = 64, depth: int, batch_norm: bool = True
    ) -> None:
        super().__init__()
        self.batch_norm = batch_norm
        self.groups = nn.ModuleList()
        channels = in_channels
        for count, scale in zip(VGG_GROUPS[depth], (1, 2, 4, 8, 8), strict=True):
            layers: list[nn.Module] = []
            for _ in range(count):
                if batch_norm:
                    layers.append(ConvBNReLU(channels, scale * width))
                else:
                    layers += [nn.Conv2d(channels, scale * width, 3, padding=1), nn.ReLU()]
                channels = scale * width
            self.groups.append(nn.Sequential(*layers))
        self.classifier = nn.Linear(channels, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialisation of the net without batch norm (`reinitialized` calls this after the layers' own)."""
        if self.batch_norm:
            return
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits Float[b classes]."""
        maps = images
        for group in self.groups:
            maps = F.max_pool2d(group(maps), 2, ceil_mode=True)
        pooled = global_average_pool(maps) if self.batch_norm else global_max_pool(maps)
        logits: Tensor = self.classifier(pooled)
        return logits
