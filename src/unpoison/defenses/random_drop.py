"""A control: drop examples at random.

Whatever a dropping defense does for the attack success, some of it comes from training on less. This drops as
many, in the same epochs, without looking: what remains of the difference is the defense's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor, nn

from unpoison._seeds import generator
from unpoison.data import TrainingSet
from unpoison.defenses._dropping import (
    DroppingDefense,
    Drops,
    check_schedule,
    check_sizes,
    on_schedule,
    size_of_round,
)
from unpoison.defenses._methods import register
from unpoison.training import Recipe


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
class RandomDrop(DroppingDefense):
    """Drop at random, cumulatively.

    Arguments:
        sizes: pairs of an epoch and how many examples to drop before it; where there are any, they are the
            whole schedule. `RandomDrop.like(defense)` takes them from a defense that has been used.
        share: without sizes, what each round drops of the examples of the run, in [0, 1].
        interval: without sizes, epochs from round to round; rounds are at its multiples.
        warm_up: without sizes, the first epoch that may have a round.
        last_epoch: without sizes, the last one; None is the recipe's last milestone, or three quarters of
            the epochs where it has none.
        seed: of the draw.

    Raises:
        InputError: a value is out of its range.

    >>> control = RandomDrop(sizes=((10, 300), (12, 80)))
    >>> [epoch for epoch in range(40) if control.is_round(epoch)]
    [10, 12]
    """

    sizes: tuple[tuple[int, int], ...] = ()
    share: float = 0.01
    interval: int = 2
    warm_up: int = 10
    last_epoch: int | None = None
    seed: int = 0
    _drops: Drops = field(default_factory=Drops, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_schedule("random-drop", self.interval, self.warm_up, self.last_epoch)
        object.__setattr__(self, "sizes", check_sizes("random-drop", self.sizes, self.share))

    @classmethod
    def like(cls, defense: DroppingDefense, *, seed: int = 0) -> RandomDrop:
        """The control of a defense that has been used: as many in the same epochs.

        Raises:
            InputError: it has had no round yet.
        """
        return cls(sizes=defense.sizes_so_far(), seed=seed)

    def _is_round(self, epoch: int, recipe: Recipe | None) -> bool:
        if self.sizes:
            return any(epoch == number for number, _ in self.sizes)
        return on_schedule(epoch, self.interval, self.warm_up, self.last_epoch, recipe)

    def _look(self, model: nn.Module, training_set: TrainingSet) -> Tensor | None:
        return None

    def _out(
        self, epoch: int, logits: Tensor | None, labels: Tensor, included: Tensor, alive: Tensor
    ) -> Tensor:
        living = alive.nonzero().squeeze(1)
        count = size_of_round(epoch, self.sizes, self.share, int(included.sum()), len(living))
        draws = generator(self._seed(self.seed, epoch), "random drop")
        drawn = torch.randperm(len(living), generator=draws)[:count].to(labels.device)
        out = included & ~alive
        out[living[drawn]] = True
        return out
