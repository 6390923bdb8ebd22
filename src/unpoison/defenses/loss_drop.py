"""A control: drop the examples of highest loss.

What stands alone in gradient space mostly has a high loss too. This drops as many, in the same epochs, by the
loss alone: what remains of the difference is due to the geometry.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch.nn.functional as F
from torch import Tensor

from unpoison.defenses._dropping import (
    DroppingDefense,
    Drops,
    check_schedule,
    check_sizes,
    on_schedule,
    size_of_round,
)
from unpoison.defenses._gradients import check_logits
from unpoison.defenses._methods import register
from unpoison.training import Recipe


@final
@register(
    name="loss-drop",
    title="Drop of the highest losses",
    summary="A control: drops the examples of highest loss, as many and when another defense does.",
    paper="a control",
    cost="a round: one forward pass",
    drops_examples=True,
    copies_drops=True,
)
@dataclass(frozen=True, kw_only=True)
class LossDrop(DroppingDefense):
    """Drop the highest losses, cumulatively, over all classes together.

    Arguments:
        sizes: pairs of an epoch and how many examples to drop before it; where there are any, they are the
            whole schedule. `LossDrop.like(defense)` takes them from a defense that has been used.
        share: without sizes, what each round drops of the examples of the run, in [0, 1].
        interval: without sizes, epochs from round to round; rounds are at its multiples.
        warm_up: without sizes, the first epoch that may have a round.
        last_epoch: without sizes, the last one; None is the recipe's last milestone, or three quarters of
            the epochs where it has none.

    Raises:
        InputError: a value is out of its range.
    """

    sizes: tuple[tuple[int, int], ...] = ()
    share: float = 0.01
    interval: int = 2
    warm_up: int = 10
    last_epoch: int | None = None
    _drops: Drops = field(default_factory=Drops, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_schedule("loss-drop", self.interval, self.warm_up, self.last_epoch)
        object.__setattr__(self, "sizes", check_sizes("loss-drop", self.sizes, self.share))

    @classmethod
    def like(cls, defense: DroppingDefense) -> LossDrop:
        """The control of a defense that has been used: as many in the same epochs.

        Raises:
            InputError: it has had no round yet.
        """
        return cls(sizes=defense.sizes_so_far())

    def _is_round(self, epoch: int, recipe: Recipe | None) -> bool:
        if self.sizes:
            return any(epoch == number for number, _ in self.sizes)
        return on_schedule(epoch, self.interval, self.warm_up, self.last_epoch, recipe)

    def _out(
        self, epoch: int, logits: Tensor | None, labels: Tensor, included: Tensor, alive: Tensor
    ) -> Tensor:
        assert logits is not None
        check_logits(logits, labels)
        losses = F.cross_entropy(logits.double(), labels, reduction="none").masked_fill(~alive, -1.0)
        count = size_of_round(epoch, self.sizes, self.share, int(included.sum()), int(alive.sum()))
        out = included & ~alive
        out[losses.argsort(descending=True, stable=True)[:count]] = True
        return out
