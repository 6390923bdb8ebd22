"""Draws of the defenses that mix images and labels, on the device of the images."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

Alpha = Annotated[float, "[0.001, 1000]"]
"""The parameter of a symmetric Dirichlet distribution."""


def dirichlet(alpha: float, ways: int, generator: torch.Generator) -> Tensor:
    """Float[ways]: weights that sum to one, from the symmetric Dirichlet distribution."""
    parameters = torch.full((ways,), float(alpha), dtype=torch.float64, device=generator.device)
    drawn = torch._standard_gamma(parameters, generator=generator).clamp_(min=1e-300)
    return (drawn / drawn.sum()).float()


def order(count: int, generator: torch.Generator) -> Tensor:
    """Int64[count]: a random permutation."""
    return torch.randperm(count, generator=generator, device=generator.device)
