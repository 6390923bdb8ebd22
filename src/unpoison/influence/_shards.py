"""`Shard`: the examples that one process of several reads, and the sums over all processes.

Without a `torch.distributed` process group there is one shard, and nothing is communicated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor, distributed


@final
@dataclass(frozen=True)
class Shard:
    """Process `rank` of `world`."""

    rank: int = 0
    world: int = 1

    @classmethod
    def current(cls) -> Shard:
        """This process's shard in the default process group, if there is one."""
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size())
        return cls()

    def bounds(self, total: int) -> tuple[int, int]:
        """The consecutive examples of `total` that this process reads."""
        return total * self.rank // self.world, total * (self.rank + 1) // self.world

    def add_(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world > 1:
            distributed.all_reduce(tensor)
        return tensor

    def broadcast_(self, tensor: Tensor, owner: int) -> Tensor:
        """The tensor of process `owner` (modulo their number), in place."""
        if self.world > 1:
            distributed.broadcast(tensor, src=owner % self.world)
        return tensor

    def gather(self, tensor: Tensor, total: int) -> Tensor:
        """The rows of all processes, in order, where each has its `bounds` of `total` rows."""
        if self.world == 1:
            return tensor
        whole = tensor.new_zeros(total, *tensor.shape[1:])
        start, stop = self.bounds(total)
        whole[start:stop] = tensor
        return self.add_(whole)  # supported by gloo and nccl, also for shards of unequal length
