"""`Normalized`: a network that standardises its inputs itself, and so takes images in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from unpoison.errors import InputError


@final
class Normalized(nn.Module):
    """(images - mean) / std, then the network.

    Mean and standard deviation are buffers: saved with the weights, moved with the model, not trained.

    Arguments:
        network: takes standardised images Float[b c h w].
        mean: one number a channel, in units of the whole range [0, 1].
        std: one positive number a channel, in the same units.

    Raises:
        InputError: mean and std differ in length or a std is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not len(mean):
            raise InputError(
                f"normalization: {len(mean)} means and {len(std)} deviations; give one of each a channel"
            )
        if min(std) <= 0:
            raise InputError(f"normalization: the standard deviations must be positive, found {tuple(std)}")
        self.network = network
        self.register_buffer("mean", torch.tensor(tuple(mean), dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(tuple(std), dtype=torch.float32).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Logits of Float[b c h w] images in [0, 1]."""
        logits: Tensor = self.network((images - self.mean) / self.std)
        return logits
