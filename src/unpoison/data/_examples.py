"""`Examples`: the interface through which training data is read.

Examples are read in consecutive batches only, so they may lie in memory, in a memory map or in a stream, and
are read in one pass with memory bounded by the batch.
"""

from __future__ import annotations

from typing import Protocol, final, runtime_checkable

import torch
from torch import Tensor

from unpoison.errors import InputError


@runtime_checkable
class Examples(Protocol):
    """A finite sequence of examples, read in consecutive batches."""

    def __len__(self) -> int:
        """How many examples there are."""
        ...

    def batch(self, start: int, stop: int) -> tuple[Tensor, ...]:
        """Examples `start` to `stop` (exclusive), as tensors whose first dimension counts examples."""
        ...


@final
class TensorExamples:
    """Examples in memory as parallel tensors, for inputs that are not images.

    >>> import torch
    >>> examples = TensorExamples(torch.randn(5, 3), torch.arange(5))
    >>> [part.shape[0] for part in examples.batch(3, 5)]
    [2, 2]
    """

    def __init__(self, *tensors: Tensor) -> None:
        if not tensors or len({len(tensor) for tensor in tensors}) != 1:
            raise InputError("TensorExamples: give one or more tensors that all have the same length")
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def batch(self, start: int, stop: int) -> tuple[Tensor, ...]:
        """Examples `start` to `stop` (exclusive)."""
        return tuple(tensor[start:stop] for tensor in self.tensors)

    def to(self, device: torch.device | str) -> TensorExamples:
        """The same examples on another device."""
        return TensorExamples(*(tensor.to(device) for tensor in self.tensors))
