"""A control: drop examples at random.

Some of the effect of a dropping defense comes from training on fewer examples. This control drops as many at
random before the same epochs, so a remaining difference is due to the choice of examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from unpoison._seeds import generator
from unpoison.data import TrainingSet
from unpoison.defenses._dropping import ControlDrop
from unpoison.defenses._methods import register


@final
@register(
    name="random-drop",
    title="Drop at random",
    summary="A control: drops examples at random, as many and when another defense does.",
    paper="a control",
    cost="none",
    drops_examples=True,
    copies_drops=True,
)
@dataclass(frozen=True, kw_only=True)
class RandomDrop(ControlDrop):
    """Drop at random, cumulatively; arguments as `ControlDrop`.

    >>> control = RandomDrop(sizes=((10, 300), (12, 80)))
    >>> [epoch for epoch in range(40) if control.is_round(epoch)]
    [10, 12]
    """

    def _look(self, model: nn.Module, training_set: TrainingSet) -> Tensor | None:
        return None

    def _out(
        self, epoch: int, logits: Tensor | None, labels: Tensor, included: Tensor, alive: Tensor
    ) -> Tensor:
        living = alive.nonzero().squeeze(1)
        draws = generator(self._round_seed(epoch), "random drop")
        drawn = torch.randperm(len(living), generator=draws)[: self._size(epoch, included, alive)]
        out = included & ~alive
        out[living[drawn.to(labels.device)]] = True
        return out
