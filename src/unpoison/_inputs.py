"""The inputs of several examples, as networks take them: a tensor, or a mapping of tensors passed by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

Inputs = Tensor | Mapping[str, Tensor]
"""The inputs of several examples: a tensor, or tensors by name, whose first dimension counts examples."""


def rows_of(inputs: Inputs, rows: Any) -> Inputs:
    """The inputs at `rows`, an index or a slice of the first dimension."""
    if isinstance(inputs, Tensor):
        return inputs[rows]
    return {name: part[rows] for name, part in inputs.items()}


def joined(parts: Sequence[Inputs]) -> Inputs:
    """The inputs one after another."""
    if isinstance(parts[0], Tensor):
        return torch.cat(cast("list[Tensor]", list(parts)))
    named = cast("Sequence[Mapping[str, Tensor]]", parts)
    return {name: torch.cat([part[name] for part in named]) for name in named[0]}


def placed(inputs: Inputs, device: torch.device | str) -> Inputs:
    """The inputs on a device."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    return {name: part.to(device) for name, part in inputs.items()}


def count_of(inputs: Inputs) -> int:
    """How many examples the inputs are of."""
    return len(inputs if isinstance(inputs, Tensor) else next(iter(inputs.values())))


def differentiable(inputs: Inputs) -> Inputs:
    """Copies of tensors that were made under `inference_mode`, which cannot be saved for a backward pass."""
    if isinstance(inputs, Tensor):
        return inputs.clone() if inputs.is_inference() else inputs
    return {name: one.clone() if one.is_inference() else one for name, one in inputs.items()}
