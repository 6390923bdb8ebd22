"""The outer optimisers of MetaPoison, which move the poison against the meta-gradient.

"adam" is that of the public code: with a rate of 200 and changes of at most 8, it drives nearly every value
to its bound at once and only moves within the ball when the rate has fallen to 2. "signed" says the same
openly: the sign of the averaged gradient times a part of the bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, final

import torch
from torch import Tensor

_DECAY, _SQUARE_DECAY, _TINY = 0.9, 0.999, 1e-8


@final
class OuterOptimizer:
    """Adam (Kingma and Ba 2015), or the sign of its first moment.

    Arguments:
        kind: "adam" takes rates as they are; "signed" takes them as parts of each variable's scale.
        scales: the largest magnitude of each variable.
    """

    def __init__(self, kind: Literal["adam", "signed"], scales: Mapping[str, float]) -> None:
        self.kind = kind
        self.scales = dict(scales)
        self.steps = 0
        # mean.NAME and square.NAME, once the first step has been taken.
        self.tensors: dict[str, Tensor] = {}

    def step(
        self, variables: Mapping[str, Tensor], gradients: Mapping[str, Tensor], rate: float
    ) -> dict[str, Tensor]:
        """The variables after one step, not yet projected."""
        self.steps += 1
        moved = {}
        for name, value in variables.items():
            gradient = gradients[name]
            mean = self.tensors.get(f"mean.{name}", torch.zeros_like(value)).lerp(gradient, 1 - _DECAY)
            self.tensors[f"mean.{name}"] = mean
            if self.kind == "signed":
                moved[name] = value - rate * self.scales[name] * mean.sign()
                continue
            square = self.tensors.get(f"square.{name}", torch.zeros_like(value))
            square = square.lerp(gradient.square(), 1 - _SQUARE_DECAY)
            self.tensors[f"square.{name}"] = square
            unbiased = (square / (1 - _SQUARE_DECAY**self.steps)).sqrt() + _TINY
            moved[name] = value - rate * mean / (1 - _DECAY**self.steps) / unbiased
        return moved
