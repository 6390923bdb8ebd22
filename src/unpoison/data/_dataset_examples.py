"""`DatasetExamples`: any map-style dataset with the user's own transforms, read in batches.

The inputs are whatever the dataset gives: floats of any range and shape, whole numbers, mappings of tensors.
Pictures of Pillow and uint8 become Float[c h w] in [0, 1], as in a `TrainingSet`; all else is given to the
network as it is (half precision as float32).

A set whose inputs fit into `memory_bytes` is read once and kept. A larger one is read anew in every pass,
batch by batch, by `workers` processes that read ahead; then memory is that of a few batches. Every row is
compared with a checksum of its last reading, so a dataset that changes at random is found wherever it does
so, by the second pass at the latest; 64 rows are read twice before anything else.

The fingerprint is a digest of all labels, of 64 rows spread over the set, and of what the source says of its
content at no cost: names, sizes and times of files, or the fingerprint of a dataset of Hugging Face. It then
begins with "files:", "source:" or "rows:". A set that is kept in memory has a digest of its whole content, as
`content_fingerprint` gives for any. `identity` asks for one of the two.

With a `cache`, every row is decoded once and written to disk; see `_cache`. Labels are not in it: a dataset
that does not have them apart from its inputs is read for them each time that the set is made.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, cast, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from unpoison._artefacts import canonical_json, digest
from unpoison._inputs import Inputs, joined, rows_of
from unpoison._progress import Progress
from unpoison.data._cache import CachedFetch, cached
from unpoison.data._classes import as_class_names, class_names_or_numbers
from unpoison.data._examples import Indices, content_of, ids_at
from unpoison.data._fetch import (
    Fetch,
    Fetched,
    Reading,
    Sampled,
    Shape,
    as_input,
    changes,
    check_finite,
    content,
)
from unpoison.data._source import Part, Source, as_numbers
from unpoison.errors import InputError

KEPT_BYTES: Final = 1 << 28
"""The default of `memory_bytes`: 256 MiB."""
Identity = Literal["cheap", "content"]
"""What a fingerprint is made of."""
_CHUNK: Final = 128
_CHUNK_BYTES: Final = 1 << 24
_STATISTICS: Final = 1024


@final
class DatasetExamples:
    """Examples around a map-style dataset.

    Arguments:
        dataset: anything with `len()` and `[index]`, without random transforms; `Subset`, `ConcatDataset`, a
            dataset of Hugging Face, torchvision or timm, or a pair of arrays (inputs, labels).
        inputs: which part of a row is the input: a place in a tuple or a key. Guessed when None: the first
            part; `pixel_values`, `image`, `img`, ...; all tensors of a row with `input_ids`.
        labels: which part is the label, the second or `label`, `labels`, `target`, ... when None; or the
            labels of all n rows. Labels are whole numbers, or names of classes.
        ids: which part is what people call the example, or n ids; names of files when None, where the dataset
            has files.
        class_names: the names of the classes; the dataset's own when None, else numbers.
        collate_fn: makes a batch of a list of rows, as for `torch.utils.data.DataLoader`; `inputs` and
            `labels` are then parts of a batch.
        workers: processes that read ahead; 0 reads in this one. They are started anew in every pass.
        memory_bytes: keep the inputs in memory where they take no more than this, and there is no cache.
        identity: what the fingerprint is made of: "cheap" of names, sizes and times of files or what else the
            dataset says, with 64 rows; "content" of everything, which costs a pass. None takes the second for
            a set that is kept in memory, and the first for others.
        cache: a folder in which the inputs are kept as they were decoded; further passes, and other
            processes, then read them from there.
        name: what to call the set in messages; by default the name of the dataset's type.
        progress: called with "reading", rows done and rows to do, while labels are collected; with "caching"
            while the cache is filled.

    Raises:
        InputError: it is no map-style dataset, it is empty, a row cannot be read or split, a label is no
            class, rows have different shapes without a `collate_fn`, an input is NaN or infinite, rows change
            when they are read again, or there is a cache for a dataset that says nothing of its content.

    >>> examples = DatasetExamples([(torch.randn(5), row % 2) for row in range(6)])
    >>> inputs, labels = examples.batch(0, 4)
    >>> tuple(inputs.shape), labels.tolist(), examples.class_names
    ((4, 5), [0, 1, 0, 1], ('0', '1'))
    """

    def __init__(
        self,
        dataset: Any,
        *,
        inputs: Part | None = None,
        labels: Part | Sequence[Any] | Tensor | None = None,
        ids: Part | Sequence[str] | None = None,
        class_names: Sequence[Any] | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        workers: int = 0,
        memory_bytes: int = KEPT_BYTES,
        identity: Identity | None = None,
        cache: str | os.PathLike[str] | None = None,
        name: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        if workers < 0 or memory_bytes < 0:
            raise InputError(
                f"DatasetExamples: workers and memory_bytes must be at least 0, found {workers} and "
                f"{memory_bytes}"
            )
        sampled = dataset
        if not isinstance(dataset, Sampled):
            sampled = Sampled(
                Source(dataset, inputs=inputs, labels=labels, ids=ids, collate_fn=collate_fn, name=name)
            )
        self.source = source = sampled.source
        self.name, self.workers = source.name, workers
        self.reading = Reading()
        """What has been read until now, and how long it took; of subsets, too."""
        self._sampled, self._identity = sampled, identity
        self._fetch: Fetch | CachedFetch = sampled.fetch
        self._rows = torch.arange(len(source))
        self._kept: Inputs | None = None
        self._ahead: _Ahead | None = None
        self._sums = np.zeros(len(source), np.uint32)
        known = source.class_names() if class_names is None else as_class_names(self.name, class_names)
        self.ids: Sequence[str] | None = source.ids()
        found = source.labels()
        keep = (
            source.collate_fn is None
            and cache is None
            and sampled.bytes_of_a_row * len(source) <= memory_bytes
        )
        if keep or found is None or source.id_part is not None:
            read = self._read(keep, progress)
            found, self._kept = read.labels if found is None else found, read.inputs
            self.ids = tuple(read.ids) if source.id_part is not None else self.ids
        self.labels, known = as_numbers(self.name, found, known)
        self._all_labels = self.labels
        self.class_names = class_names_or_numbers(self.name, known, {self.name: self.labels})
        if cache is not None:
            if source.collate_fn is not None:
                raise InputError(f"{self.name}: batches of a collate_fn cannot be cached (--cache)")
            self._fetch = cached(Path(cache), self._cheap_identity, sampled.fetch, self._in_order, progress)
            self.workers = 0

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def num_classes(self) -> int:
        """How many classes there are, including classes without examples."""
        return len(self.class_names)

    @property
    def device(self) -> torch.device:
        """The processor's memory."""
        return torch.device("cpu")

    @property
    def input_shape(self) -> Shape:
        """The shape of one input, or of each of its tensors; of the first row, where rows differ."""
        shape: Shape = self._fetch.shape
        return shape

    @property
    def rows(self) -> Tensor:
        """Int64[n], the rows of the dataset that these are."""
        return self._rows

    @property
    def fingerprint(self) -> str:
        """See the module's docstring; which kind of identity it is stands before a colon."""
        if len(self._rows) == len(self.source) and bool((self._rows == torch.arange(len(self.source))).all()):
            return self._fingerprint
        return digest(self._fingerprint, self._rows.numpy().tobytes())

    def content_fingerprint(self) -> str:
        """A digest of all inputs, labels and class names. Cost: a pass over the set."""
        parts = []
        for inputs, labels in self.in_batches(self._chunk):
            parts += [content(inputs), content_of(labels)]
        return digest(canonical_json(list(self.class_names)), *parts)

    def batch(self, start: int, stop: int) -> tuple[Inputs, Tensor]:
        """Inputs and labels Int64[b] of the examples `start` to `stop`; reads ahead where there are workers.

        Raises:
            InputError: a row cannot be read, is of another shape than the first, is not finite, or has
                changed since it was read last.
        """
        if self._kept is not None or not self.workers:
            return self.at(torch.arange(start, min(stop, len(self))))
        if self._ahead is None or self._ahead.following != (start, stop - start):
            self._ahead = _Ahead(self, start, stop - start)
        batch = self._ahead.take()
        if batch is None:
            self._ahead = None
            return self.at(torch.arange(start, min(stop, len(self))))
        return batch

    def at(self, indices: Indices) -> tuple[Inputs, Tensor]:
        """Inputs and labels of the examples at `indices`; see `batch`."""
        places = torch.as_tensor(indices, dtype=torch.int64).reshape(-1)
        rows = self._rows[places]
        if self._kept is not None:
            return _as_given(rows_of(self._kept, rows)), self.labels[places]
        asked = rows if len(rows) else torch.zeros(1, dtype=torch.int64)  # no rows have a shape, too
        [one] = self._fetched([asked.tolist()])
        return rows_of(self._checked(asked, one), slice(len(rows))), self.labels[places]

    def in_batches(self, size: int, order: Tensor | None = None) -> Iterator[tuple[Inputs, Tensor]]:
        """Batches of at most `size` examples, of those at Int64[k] `order` or of all; see `batch`."""
        order = torch.arange(len(self)) if order is None else order
        if self._kept is not None or not len(order):
            yield from (self.at(places) for places in torch.split(order, size))
            return
        batches = list(torch.split(order, size))
        fetched = self._fetched([self._rows[places].tolist() for places in batches])
        for places, one in zip(batches, fetched, strict=True):
            yield self._checked(self._rows[places], one), self.labels[places]

    def subset(self, indices: Indices) -> DatasetExamples:
        """The examples at `indices` (or a mask Bool[n]), in that order; nothing is copied."""
        places = torch.as_tensor(indices)
        if places.dtype == torch.bool:
            places = places.nonzero()[:, 0]
        places = places.to(torch.int64).reshape(-1).cpu()
        part = copy.copy(self)
        part._ahead = None
        for name in ("channel_statistics", "value_range"):
            part.__dict__.pop(name, None)
        part._rows, part.labels = self._rows[places], self.labels[places]
        part.ids = ids_at(self.ids, places)
        return part

    def given(self, where: str, value: Any) -> Inputs:
        """Another input as rows of this set are given to the network, with a first dimension of 1.

        Arguments:
            where: what to call it in messages.
            value: as the rows of the dataset have it: a picture, an array, a tensor, a mapping of tensors.

        Raises:
            InputError: it is no input, of another shape than the first row, or not finite.
        """
        one = self._sampled.fetch.like_the_first(where, as_input(where, value))
        check_finite(one, lambda _: where, rows=False)
        rows = one[None] if isinstance(one, Tensor) else {name: part[None] for name, part in one.items()}
        return _as_given(rows)

    def renamed(self, name: str) -> DatasetExamples:
        """The same examples under another name."""
        other = copy.copy(self)
        other.name, other._ahead = name, None
        return other

    @cached_property
    def channel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel of Float[c h w] inputs, of up to 1,024 examples.

        Raises:
            InputError: the inputs are no images.
        """
        some = self._some_images().double()
        mean, std = some.mean((0, 2, 3)), some.std((0, 2, 3), correction=0)
        return tuple(mean.tolist()), tuple(std.clamp(min=1e-3).tolist())

    @cached_property
    def value_range(self) -> tuple[float, float]:
        """Which values are black and white: 0 and 1 where all lie between, else the smallest and largest.

        Of up to 1,024 examples.

        Raises:
            InputError: the inputs are no images.
        """
        some = self._some_images()
        low, high = float(some.min()), float(some.max())
        return (0.0, 1.0) if low >= 0 and high <= 1 else (low, max(high, low + 1e-6))

    @property
    def of_images(self) -> bool:
        """Whether inputs are Float[c h w], with any number of channels."""
        shape = self.input_shape
        if isinstance(shape, Mapping) or len(shape) != 3 or self.source.collate_fn is not None:
            return False
        first = self._sampled.first
        return isinstance(first, Tensor) and (first.dtype == torch.uint8 or first.is_floating_point())

    def _some_images(self) -> Tensor:
        if not self.of_images:
            raise InputError(
                f"{self.name}: this is for images [c, h, w], found inputs of shape {self.input_shape}"
            )
        count = min(len(self), _STATISTICS)
        return cast("Tensor", self.at(torch.arange(count) * len(self) // count)[0])

    def _read(self, keep: bool, progress: Progress | None) -> _Read:
        """All labels and ids, and the inputs if they are to be kept."""
        count, done = len(self.source), 0
        inputs: list[Inputs] = []
        labels: list[Any] = []
        ids: list[str] = []
        for one, size in self._in_order():
            if keep:
                inputs.append(one.inputs)
            labels += one.labels
            ids += one.ids
            done += size
            if progress is not None:
                progress("reading", done, count)
        return _Read(joined(inputs) if keep else None, labels, ids)

    def _in_order(self) -> Iterator[tuple[Fetched, int]]:
        """All rows of the source, in batches, and how many each has."""
        batches = [rows.tolist() for rows in torch.split(torch.arange(len(self.source)), self._chunk)]
        for rows, one in zip(batches, self._fetched(batches), strict=True):
            self._checked(torch.tensor(rows), one, given=True)
            yield one, len(rows)

    @property
    def _chunk(self) -> int:
        """How many rows to read at a time where that is free to choose."""
        return max(1, min(_CHUNK, _CHUNK_BYTES // max(int(self._sampled.bytes_of_a_row), 1)))

    def _fetched(self, batches: Sequence[list[int]]) -> Iterator[Fetched]:
        """What is read of each list of rows, by the workers where there are some."""
        fetched: Iterable[Fetched] = (self._fetch[rows] for rows in batches)
        if self.workers and len(batches) > 1:
            fetched = DataLoader(
                cast("Any", self._fetch),
                sampler=cast("Any", batches),
                batch_size=None,
                num_workers=min(self.workers, len(batches)),
                collate_fn=_as_it_is,
                generator=torch.Generator().manual_seed(0),  # the global random state is left alone
            )
        started = time.perf_counter()
        for rows, one in zip(batches, fetched, strict=True):
            self.reading.rows += len(rows)
            self.reading.seconds += one.seconds
            self.reading.waited += time.perf_counter() - started
            yield one
            started = time.perf_counter()

    def _checked(self, rows: Tensor, one: Fetched, *, given: bool = False) -> Inputs:
        """The inputs of a batch, after comparison with their last reading."""
        one.check()
        if one.sums is not None:
            places = rows.numpy()
            before = self._sums[places]
            changed = (before != one.sums) & (before != 0)
            if changed.any():
                raise InputError(changes(f"{self.name}: row {int(places[changed.argmax()])}"))
            self._sums[places] = one.sums
        return one.inputs if given else _as_given(one.inputs)

    @cached_property
    def _fingerprint(self) -> str:
        if self._identity == "content":
            whole = copy.copy(self)  # also of a subset
            whole._rows, whole.labels = torch.arange(len(self.source)), self._all_labels
            return f"content:{whole.content_fingerprint()}"
        if self._kept is not None and self._identity is None:
            return digest(*self._labelling, content(self._kept))
        return self._cheap_identity

    @property
    def _labelling(self) -> tuple[str, bytes]:
        return canonical_json(list(self.class_names)), content_of(self._all_labels)

    @cached_property
    def _cheap_identity(self) -> str:
        own = (*self._labelling, self._sampled.digest)
        identity, files = self.source.identity(), self.source.files()
        if files is not None:
            return "files:" + digest(*own, _stated(files))
        if identity is not None:
            return "source:" + digest(*own, identity)
        return "rows:" + digest(*own, str(len(self.source)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ahead": None}


@final
class _Read:
    """What one pass over all rows gave."""

    def __init__(self, inputs: Inputs | None, labels: list[Any], ids: list[str]) -> None:
        self.inputs, self.labels, self.ids = inputs, labels, ids


@final
class _Ahead:
    """Consecutive batches that workers read ahead."""

    def __init__(self, examples: DatasetExamples, start: int, size: int) -> None:
        order = torch.arange(start, len(examples))
        self._batches = examples.in_batches(size, order)
        self.following = (start, size)
        self._left = -(-len(order) // size)

    def take(self) -> tuple[Inputs, Tensor] | None:
        """The next batch."""
        batch = next(self._batches, None)
        start, size = self.following
        self.following = (start + size, size)
        self._left -= 1
        if not self._left:
            next(self._batches, None)  # ends the workers
        return batch


def _as_it_is(value: Any) -> Any:
    return value


def _as_given(inputs: Inputs) -> Inputs:
    """The inputs as a network takes them: pixels in [0, 1]."""
    if isinstance(inputs, Tensor):
        return inputs.float().div_(255) if inputs.dtype == torch.uint8 else inputs
    return {name: cast("Tensor", _as_given(part)) for name, part in inputs.items()}


def _stated(files: Sequence[tuple[str, Path]]) -> str:
    """Names, sizes and times of files."""
    known: dict[Path, str] = {}
    for name, path in files:
        if path in known:
            continue
        try:
            told = path.stat()
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
        known[path] = f"{name}\t{told.st_size}\t{told.st_mtime_ns}"
    return "\n".join(known[path] for _, path in files)
