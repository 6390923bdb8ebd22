"""Rows of a data set on disk, as they were decoded: the cache of `DatasetExamples`.

An entry is a folder whose name is a digest of the set's fingerprint and of the shapes of its rows. It holds
one file of plain numbers for each tensor of a row, the checksums of all rows, and entry.json. It is written
beside its place and renamed when it is complete, so a stopped process leaves none; an entry that lacks a file
or has one of another size is made again. Every row that is read is compared with its checksum, and a damaged
one is read from the dataset again and mended.

Rows are read from their positions in the files rather than through a memory map. The page cache of the
system serves both alike, but pages of a map count as memory of the process, and a map of a file that is cut
short ends it.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, cast, final

import numpy as np
import torch
from torch import Tensor

from unpoison._artefacts import atomic_directory, canonical_json, digest, read_json, write_json
from unpoison._inputs import Inputs
from unpoison._progress import Progress
from unpoison.data._fetch import Fetch, Fetched, Shape, checksum
from unpoison.errors import InputError

_ENTRY: Final = "entry.json"
_SUMS: Final = "sums.bin"
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def cached(
    folder: Path,
    fingerprint: str,
    fetch: Fetch,
    read: Callable[[], Iterable[tuple[Fetched, int]]],
    progress: Progress | None,
) -> CachedFetch:
    """What reads rows from the cache; the entry is made if it is not there or damaged.

    Arguments:
        folder: the cache, for any number of sets.
        fingerprint: of the set.
        fetch: reads rows of the dataset.
        read: gives all rows in order, by `fetch`, in batches with their numbers of rows.
        progress: told "caching", rows done and rows to do.

    Raises:
        InputError: the dataset says nothing of its content, the cache is no folder, there is no room for the
            set on its disk, or a row cannot be read.
    """
    if fingerprint.startswith("rows:"):
        raise InputError(
            f"{fetch.source.name}: cannot be cached on disk: it names no files and has no "
            "fingerprint, so an entry could be that of another set; leave out the cache (--cache)"
        )
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is no folder, which a cache (--cache) must be")
    first = fetch[[0]]
    first.check()
    layout = _Layout(first.inputs, len(fetch.source))
    place = folder / digest(fingerprint, layout.text)
    if not layout.complete(place):
        _make(place, layout, fetch.source.name, read, progress)
    return CachedFetch(place, layout, fetch)


@final
class _Layout:
    """The files of an entry and how rows lie in them.

    Arguments:
        like: the inputs of one row.
        count: how many rows there are.
    """

    def __init__(self, like: Inputs, count: int) -> None:
        self.parts = {"": like} if isinstance(like, Tensor) else dict(like)
        self.single, self.count = isinstance(like, Tensor), count
        self.widths = [part.numel() * part.element_size() for part in self.parts.values()]
        told = {name: [str(part.dtype), list(part.shape[1:])] for name, part in self.parts.items()}
        self.content = {"rows": count, "tensors": told}
        self.text = canonical_json(self.content)

    @property
    def bytes(self) -> int:
        """What an entry takes on disk."""
        return self.count * (sum(self.widths) + 4)

    def files(self, place: Path) -> list[Path]:
        """The files of numbers, in the order of the tensors."""
        return [place / f"{number}.bin" for number, _ in enumerate(self.parts)]

    def complete(self, place: Path) -> bool:
        """Whether there is an entry with all files in their full size."""
        sizes = [self.count * width for width in self.widths] + [4 * self.count]
        try:
            files = [*self.files(place), place / _SUMS]
            told = read_json(place / _ENTRY)
            return told == self.content and [file.stat().st_size for file in files] == sizes
        except (InputError, OSError):
            return False

    def bytes_of(self, inputs: Inputs) -> list[Bytes]:
        """The bytes of several rows of each tensor: UInt8[rows width]."""
        parts = [inputs] if isinstance(inputs, Tensor) else [inputs[name] for name in self.parts]
        return [
            part.contiguous().view(-1).view(torch.uint8).numpy().reshape(len(part), width)
            for part, width in zip(parts, self.widths, strict=True)
        ]

    def inputs_of(self, columns: Iterable[Bytes]) -> Inputs:
        """The inputs again of what `bytes_of` gives."""
        found = {
            name: torch.from_numpy(rows.reshape(-1)).view(part.dtype).view(len(rows), *part.shape[1:])
            for (name, part), rows in zip(self.parts.items(), columns, strict=True)
        }
        return found[""] if self.single else found


@final
class CachedFetch:
    """Reads lists of rows from an entry, as `Fetch` does from the dataset."""

    def __init__(self, place: Path, layout: _Layout, fetch: Fetch) -> None:
        self.place, self.layout, self.fetch = place, layout, fetch
        self.source = fetch.source
        self._sums = np.fromfile(place / _SUMS, np.uint32)

    @property
    def shape(self) -> Shape:
        """The shape of one input."""
        return self.fetch.shape

    def __getitem__(self, rows: list[int]) -> Fetched:
        found = Fetched()
        files = zip(self.layout.files(self.place), self.layout.widths, strict=True)
        columns = [_read(file, rows, width) for file, width in files]
        found.inputs = self.layout.inputs_of(columns)
        found.sums = np.array([checksum(found.inputs, place) for place in range(len(rows))], np.uint32)
        damaged = (found.sums != self._sums[rows]).nonzero()[0].tolist()
        if damaged:
            again = self.fetch[[rows[place] for place in damaged]]
            if again.error is not None or again.sums is None:
                return again
            for column, right in zip(columns, self.layout.bytes_of(again.inputs), strict=True):
                column[damaged] = right
            found.sums[damaged] = again.sums
            self._mend([rows[place] for place in damaged], again.inputs, again.sums)
        return found

    def _mend(self, rows: list[int], inputs: Inputs, sums: np.ndarray[Any, np.dtype[np.uint32]]) -> None:
        """Write rows again, if the cache may be written."""
        self._sums[rows] = sums
        columns = [*self.layout.bytes_of(inputs), sums.view(np.uint8).reshape(-1, 4)]
        widths = [*self.layout.widths, 4]
        with contextlib.suppress(OSError):
            for file, column, width in zip(
                [*self.layout.files(self.place), self.place / _SUMS], columns, widths, strict=True
            ):
                with file.open("r+b") as opened:
                    for row, content in zip(rows, column, strict=True):
                        opened.seek(row * width)
                        opened.write(content.tobytes())


def _read(file: Path, rows: list[int], width: int) -> Bytes:
    """UInt8[rows width]; zeros for what is not there."""
    found = np.zeros((len(rows), width), np.uint8)
    start = 0
    with contextlib.suppress(OSError), file.open("rb", buffering=0) as opened:
        while start < len(rows):
            stop = start + 1
            while stop < len(rows) and rows[stop] == rows[stop - 1] + 1:
                stop += 1
            opened.seek(rows[start] * width)
            left = memoryview(cast("Any", found[start:stop].reshape(-1)))
            while len(left) and (count := opened.readinto(left)):
                left = left[count:]
            start = stop
    return found


def _make(
    place: Path,
    layout: _Layout,
    name: str,
    read: Callable[[], Iterable[tuple[Fetched, int]]],
    progress: Progress | None,
) -> None:
    """Write an entry whole, or none."""
    place.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place.parent).free
    if layout.bytes > free:
        raise InputError(
            f"{place.parent}: {name} takes {layout.bytes / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free "
            "there; name a cache (--cache) on another disk, or none"
        )
    try:
        with atomic_directory(place) as staging:
            with contextlib.ExitStack() as stack:
                files = [stack.enter_context(file.open("wb")) for file in layout.files(staging)]
                sums = stack.enter_context((staging / _SUMS).open("wb"))
                done = 0
                for one, count in read():
                    assert one.sums is not None
                    for file, rows in zip(files, layout.bytes_of(one.inputs), strict=True):
                        file.write(rows.data)
                    sums.write(one.sums.tobytes())
                    done += count
                    if progress is not None:
                        progress("caching", done, layout.count)
            write_json(staging / _ENTRY, layout.content)
    except OSError:
        if not layout.complete(place):  # another process may have made it meanwhile
            raise
