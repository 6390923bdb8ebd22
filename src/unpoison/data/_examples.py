"""`Examples`: the interface through which training data is read, wherever it lies.

Examples are read in batches, so they may lie in memory, in a memory map or behind a dataset of the user's
own, and a pass over them takes the memory of a batch. `TrainingSet` holds 8-bit images in memory,
`DatasetExamples` reads any map-style dataset, and `TensorExamples` holds tensors of any kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol, TypeGuard, cast, final

import numpy as np
import torch
from torch import Tensor

from unpoison._artefacts import canonical_json, digest
from unpoison._inputs import Inputs as Inputs
from unpoison._inputs import count_of, placed, rows_of
from unpoison.errors import InputError

Batch = tuple[Any, ...]
"""Inputs and labels Int64[b] of several examples, as a network and its loss take them."""
Indices = Tensor | Sequence[int]


class Examples(Protocol):
    """A finite sequence of labelled examples, read in batches."""

    @property
    def name(self) -> str:
        """What to call the set in messages."""
        ...

    @property
    def labels(self) -> Tensor:
        """Int64[n]."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name a class."""
        ...

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        ...

    @property
    def ids(self) -> Sequence[str] | None:
        """What people call the examples: n names of files or keys of rows, where they have any."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal for equal sets; see the class for what it is made of."""
        ...

    @property
    def input_shape(self) -> tuple[int, ...] | Mapping[str, tuple[int, ...]]:
        """The shape of one input, or of each of its tensors."""
        ...

    @property
    def device(self) -> torch.device:
        """Where batches lie."""
        ...

    def __len__(self) -> int:
        """How many examples there are."""
        ...

    def batch(self, start: int, stop: int) -> Batch:
        """Inputs and labels of the examples `start` to `stop` (exclusive)."""
        ...

    def at(self, indices: Indices) -> Batch:
        """Inputs and labels of the examples at `indices`, in that order."""
        ...

    def in_batches(self, size: int, order: Tensor | None = None) -> Iterator[Batch]:
        """All batches of at most `size` examples, of those at Int64[k] `order` or of all."""
        ...

    def subset(self, indices: Indices) -> Examples:
        """The examples at `indices`, in that order."""
        ...


def is_examples(value: object) -> TypeGuard[Examples]:
    """Whether this is read by the interface of `Examples`; nothing of it is evaluated."""
    return all(hasattr(type(value), name) for name in ("batch", "at", "in_batches", "subset"))


def ids_at(ids: Sequence[str] | None, indices: Tensor) -> tuple[str, ...] | None:
    """The ids of the examples at Int64[k] `indices`."""
    return None if ids is None else tuple(ids[index] for index in indices.tolist())


def content_of(tensor: Tensor) -> bytes:
    """The bytes of a tensor of any type."""
    flat = tensor.detach().cpu().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)
    return np.ascontiguousarray(flat.numpy()).tobytes()


@final
class TensorExamples:
    """Examples in memory as parallel tensors: the inputs first, the labels (or other targets) last.

    Inputs may also be a mapping of tensors.

    >>> import torch
    >>> examples = TensorExamples(torch.randn(5, 3), torch.arange(5))
    >>> [part.shape[0] for part in examples.batch(3, 5)]
    [2, 2]
    """

    def __init__(self, *tensors: Any) -> None:
        if not tensors or len({count_of(tensor) for tensor in tensors}) != 1:
            raise InputError("TensorExamples: give one or more tensors that all have the same length")
        self.tensors = tensors
        self.name = "tensors"
        self.ids: Sequence[str] | None = None

    def __len__(self) -> int:
        return count_of(self.tensors[0])

    @property
    def labels(self) -> Tensor:
        """The last tensor."""
        return cast("Tensor", self.tensors[-1])

    @property
    def num_classes(self) -> int:
        """One more than the largest label."""
        return int(self.labels.max()) + 1 if len(self) else 0

    @property
    def class_names(self) -> tuple[str, ...]:
        """The numbers of the classes."""
        return tuple(map(str, range(self.num_classes)))

    @property
    def input_shape(self) -> tuple[int, ...] | Mapping[str, tuple[int, ...]]:
        """The shape of one input, or of each of its tensors."""
        first = self.tensors[0]
        if isinstance(first, Mapping):
            return {name: tuple(part.shape[1:]) for name, part in first.items()}
        return tuple(first.shape[1:])

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return self.labels.device

    @cached_property
    def fingerprint(self) -> str:
        """A digest of all tensors."""
        tensors = [
            part for one in self.tensors for part in (one.values() if isinstance(one, Mapping) else [one])
        ]
        parts = ((canonical_json([str(one.dtype), list(one.shape)]), content_of(one)) for one in tensors)
        return digest(*(part for both in parts for part in both))

    def batch(self, start: int, stop: int) -> Batch:
        """Examples `start` to `stop` (exclusive)."""
        return tuple(rows_of(tensor, slice(start, stop)) for tensor in self.tensors)

    def at(self, indices: Indices) -> Batch:
        """The examples at `indices`."""
        rows = torch.as_tensor(indices, dtype=torch.int64, device=self.device)
        return tuple(rows_of(tensor, rows) for tensor in self.tensors)

    def in_batches(self, size: int, order: Tensor | None = None) -> Iterator[Batch]:
        """Batches of at most `size` examples."""
        return (self.at(rows) for rows in torch.split(_order(len(self), order), size))

    def subset(self, indices: Indices) -> TensorExamples:
        """The examples at `indices`, in that order."""
        return TensorExamples(*self.at(indices))

    def to(self, device: torch.device | str) -> TensorExamples:
        """The same examples on another device."""
        return TensorExamples(*(placed(tensor, device) for tensor in self.tensors))


def _order(count: int, order: Tensor | None) -> Tensor:
    return torch.arange(count) if order is None else order
