"""The examples of each batch of an epoch."""

from __future__ import annotations

import torch
from torch import Tensor

from unpoison._seeds import generator


def epoch_order(alive: Tensor, *, seed: int, epoch: int) -> Tensor:
    """Int64[m]: the indices where Bool[n] `alive` holds, shuffled for `epoch`; on the device of `alive`.

    Drawn on the CPU, so that the order is the same on every device.
    """
    chosen = alive.nonzero().squeeze(1)
    shuffle = torch.randperm(len(chosen), generator=generator(seed, "epoch", epoch, "order"))
    return chosen[shuffle.to(alive.device)]


def batch_bounds(count: int, batch_size: int) -> list[tuple[int, int]]:
    """Start and stop of each batch over `count` examples.

    The last batch may be smaller; a last batch of a single example is joined to the one before, since batch
    norm cannot train on one.

    >>> batch_bounds(7, 3), batch_bounds(8, 3), batch_bounds(1, 3)
    ([(0, 3), (3, 7)], [(0, 3), (3, 6), (6, 8)], [(0, 1)])
    """
    starts = list(range(0, count, batch_size))
    if len(starts) > 1 and count - starts[-1] == 1 and batch_size > 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], count], strict=True))
