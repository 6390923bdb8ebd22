"""What the defenses share that mix images and labels: weights, orders and targets, all on the device."""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from unpoison.errors import InputError


@final
class Classes:
    """How many classes the run has."""

    def __init__(self) -> None:
        self.count = 0


def check_alpha(name: str, alpha: object) -> None:
    """That a Dirichlet distribution can be drawn from.

    Raises:
        InputError: it cannot.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 1e-3 <= alpha <= 1e3:
        raise InputError(f"{name}: alpha must be a number in 0.001..1000, found {alpha!r}")


def dirichlet(alpha: float, ways: int, generator: torch.Generator) -> Tensor:
    """Float[ways]: weights that sum to one, drawn from the Dirichlet distribution of equal alphas."""
    parameters = torch.full((ways,), float(alpha), dtype=torch.float64, device=generator.device)
    drawn = torch._standard_gamma(parameters, generator=generator).clamp_(min=1e-300)
    return (drawn / drawn.sum()).float()


def order(count: int, generator: torch.Generator) -> Tensor:
    """Int64[count]: the numbers below `count`, shuffled."""
    return torch.randperm(count, generator=generator, device=generator.device)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Float[b classes]."""
    return F.one_hot(labels, classes).float()
