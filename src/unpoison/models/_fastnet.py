"""FastNet: a network that learns CIFAR-10 in seconds, after airbench94 (Jordan 2024); our own code.

    whitening       2x2 convolution, fitted to the training images by `whiten` and then fixed but for its bias
    group 1    w    conv, 2x2 max-pool, bn, GELU, conv, bn, GELU
    group 2    4w   the same
    group 3    4w   the same
    head            global max-pool, linear without bias, logits divided by 9

w = 64 as published. Convolutions are initialised to the identity on as many channels as they have inputs
(dirac). Batch norms learn a shift but no scale, with momentum 0.4 for the new batch.
"""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@final
class Whitening(nn.Module):
    """A 2x2 convolution with decorrelated outputs, each with both signs: Float[b 8c h-1 w-1].

    Its filters are the eigenvectors of the covariance of 2x2 patches, each divided by the square root of its
    eigenvalue. They are a buffer and not trained; before `fit` they are an arbitrary orthogonal set.
    """

    filters: Tensor

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        size = 4 * in_channels
        self.register_buffer("filters", torch.zeros(2 * size, in_channels, 2, 2))
        self.bias = nn.Parameter(torch.zeros(2 * size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Arbitrary orthogonal filters, zero bias."""
        size = len(self.filters) // 2
        self._set(torch.eye(size))
        nn.init.zeros_(self.bias)

    def fit(self, images: Tensor, *, floor: float = 5e-4) -> None:
        """Whiten the 2x2 patches of `images` Float[b c h w]; `floor` is added to the eigenvalues."""
        patches = F.unfold(images.float(), 2).transpose(1, 2).flatten(0, 1)
        values, vectors = torch.linalg.eigh((patches.T @ patches / len(patches)).double())
        self._set(((vectors / (values + floor).sqrt()).T.flip(0)).float())

    def _set(self, rows: Tensor) -> None:
        self.filters.copy_(torch.cat((rows, -rows)).view_as(self.filters))

    def forward(self, images: Tensor) -> Tensor:
        """Float[b c h w] to Float[b 8c h-1 w-1]."""
        return F.conv2d(images, self.filters.to(images.dtype), self.bias.to(images.dtype))


@final
class Group(nn.Module):
    """Convolution, pooling, norm, GELU; convolution, norm, GELU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(out_channels, momentum=0.4)
        self.second = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(out_channels, momentum=0.4)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Identity on as many output channels as there are inputs; the norms' scales are fixed at one."""
        for convolution in (self.first, self.second):
            nn.init.dirac_(convolution.weight.data[: convolution.in_channels])
        for norm in (self.first_norm, self.second_norm):
            norm.weight.requires_grad_(False)

    def forward(self, maps: Tensor) -> Tensor:
        """Float[b c h w] to Float[b out h/2 w/2]."""
        maps = F.gelu(self.first_norm(F.max_pool2d(self.first(maps), 2)))
        return F.gelu(self.second_norm(self.second(maps)))


@final
class FastNet(nn.Module):
    """Float[b c h w] to logits Float[b classes]; height and width at least 9.

    Arguments:
        num_classes: how many logits.
        in_channels: channels of the images.
        width: channels of the first group.
    """

    def __init__(self, *, num_classes: int, in_channels: int, width: int = 64) -> None:
        super().__init__()
        self.whitening = Whitening(in_channels)
        self.group1 = Group(8 * in_channels, width)
        self.group2 = Group(width, 4 * width)
        self.group3 = Group(4 * width, 4 * width)
        self.classifier = nn.Linear(4 * width, num_classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits Float[b classes]."""
        maps = self.group3(self.group2(self.group1(F.gelu(self.whitening(images)))))
        logits: Tensor = self.classifier(maps.amax((2, 3))) / 9
        return logits


def whiten(model: nn.Module, images: Tensor) -> None:
    """Fit every `Whitening` layer of `model`, in place, to its input for the images Float[b c h w]."""
    layers = [module for module in model.modules() if isinstance(module, Whitening)]
    if not layers:
        return

    def fit(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, Whitening)
        module.fit(inputs[0])

    handles = [layer.register_forward_pre_hook(fit) for layer in layers]
    training = model.training
    try:
        model.eval()
        with torch.no_grad():
            model(images)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
