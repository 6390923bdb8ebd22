"""Reading rows of a `Source` as tensors: in this process or in workers, with a checksum of each row."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast, final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unpoison._artefacts import digest
from unpoison.data._examples import Inputs, content_of
from unpoison.data._images import pillow_pixels
from unpoison.data._source import Source, as_number, collated, shown
from unpoison.errors import InputError

Shape = tuple[int, ...] | Mapping[str, tuple[int, ...]]


@final
class Sampled:
    """A source of which up to 64 rows, spread evenly over the set, have been read twice.

    Arguments:
        source: the rows.

    Raises:
        InputError: one of these rows cannot be read, is of another shape than the first, or changes.
    """

    def __init__(self, source: Source) -> None:
        self.source, self.fetch = source, Fetch(source)
        rows = source.sampled
        once = [self._alone(row) for row in rows]
        self.first = once[0]
        _refuse_whole_pixels(f"{source.name}: row 0", self.first)
        if source.collate_fn is None:
            pictures = [one for one in once if isinstance(one, Tensor) and one.dtype == torch.uint8]
            channels = {len(one) for one in pictures if one.ndim == 3}
            self.fetch.colour = channels == {1, 3}
            self.fetch.shape = shape_of(self.fetch.like_the_first("", self.first), rows=False)
            for row, one in zip(rows, once, strict=True):
                self.fetch.like_the_first(f"{source.name}: row {row}", one)
        else:
            self.fetch.shape = shape_of(self.first)
        for row, one in zip(rows, once, strict=True):
            if content(one) != content(self._alone(row)):
                raise InputError(changes(f"{source.name}: row {row}"))
        parts = [self.first] if isinstance(self.first, Tensor) else list(self.first.values())
        grey = 3 if self.fetch.colour and len(parts[0]) == 1 else 1
        self.bytes_of_a_row = grey * sum(part.numel() * part.element_size() for part in parts)
        self.digest = digest(*map(content, once))

    def _alone(self, row: int) -> Inputs:
        """One input; a batch of one where there is a `collate_fn`."""
        if self.source.collate_fn is not None:
            one = self.fetch[[row]]
            one.check()
            return one.inputs
        where = f"{self.source.name}: row {row}"
        found = as_input(where, self.source.input_of(where, self.source.row(row)))
        check_finite(found, lambda _: where, rows=False)
        return found


@final
class Fetched:
    """Several rows: inputs as they are kept, labels, ids, checksums and the seconds taken; or what was wrong.

    An error is carried as text, because a worker process would add its traceback to the message.
    """

    def __init__(self, error: str | None = None) -> None:
        self.error = error
        self.inputs: Inputs = torch.empty(0)
        self.labels: list[Any] = []
        self.ids: list[str] = []
        self.sums: np.ndarray[Any, np.dtype[np.uint32]] | None = None
        self.seconds = 0.0

    def check(self) -> None:
        """Raise the error, if there was one."""
        if self.error is not None:
            raise InputError(self.error)


@final
@dataclass
class Reading:
    """What has been read of a set until now, except for what is kept in memory.

    Arguments:
        rows: how many rows, each as often as it was read.
        seconds: what reading and decoding took, of all processes together.
        waited: how long this process waited for it, in seconds.
    """

    rows: int = 0
    seconds: float = 0.0
    waited: float = 0.0


@final
class Fetch:
    """Reads lists of rows; what a worker process runs."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.shape: Shape = ()
        self.colour = False

    def __getitem__(self, rows: list[int]) -> Fetched:
        started = time.perf_counter()
        try:
            found = self._rows(rows) if self.source.collate_fn is None else self._batch(rows)
        except InputError as error:
            return Fetched(str(error))
        found.seconds = time.perf_counter() - started
        return found

    def _rows(self, rows: list[int]) -> Fetched:
        source, found = self.source, Fetched()
        several = getattr(source.dataset, "__getitems__", None)
        given = None
        if several is not None and len(rows) > 1:
            try:
                given = several(rows)
            except Exception:
                given = None  # row by row, so that the message names the row
        parts: list[Inputs] = []
        for place, row in enumerate(rows):
            where = f"{source.name}: row {row}"
            one = source.row(row) if given is None else given[place]
            parts.append(self.like_the_first(where, as_input(where, source.input_of(where, one))))
            label, name = source.label_of(where, one), source.id_of(where, one)
            if label is not None:
                found.labels.append(as_number(where, label))
            if name is not None:
                found.ids.append(name)
        if isinstance(parts[0], Tensor):
            found.inputs = torch.stack(cast("list[Tensor]", parts))
        else:
            named = cast("list[Mapping[str, Tensor]]", parts)
            found.inputs = {key: torch.stack([one[key] for one in named]) for key in named[0]}
        check_finite(found.inputs, lambda place: f"{source.name}: row {rows[place]}")
        found.sums = np.array([checksum(found.inputs, place) for place in range(len(rows))], np.uint32)
        return found

    def _batch(self, rows: list[int]) -> Fetched:
        source, found = self.source, Fetched()
        assert source.collate_fn is not None
        where = f"{source.name}: a batch from row {rows[0]}"
        batch = collated(where, source.collate_fn, [source.row(row) for row in rows])
        found.inputs = as_input(where, source.input_of(where, batch), pictures=False)
        label = source.label_of(where, batch)
        if label is not None:
            found.labels = [as_number(where, one) for one in label]
        if source.id_part is not None:
            found.ids = [str(one) for one in batch[source.id_part]]
        check_finite(found.inputs, lambda place: f"{source.name}: row {rows[place]}")
        return found

    def like_the_first(self, where: str, one: Inputs) -> Inputs:
        """The input, if it is of the shape of the first row; a grey picture among coloured ones as such."""
        if self.colour and isinstance(one, Tensor) and one.shape[:1] == (1,):
            one = one.expand(3, -1, -1)
        found = shape_of(one, rows=False)
        if self.shape and found != self.shape:
            raise InputError(
                f"{where}: its input is of shape {_told(found)}, that of row 0 of {_told(self.shape)}; bring "
                "all inputs to one size, or give a collate_fn"
            )
        return one


def as_input(where: str, value: Any, *, pictures: bool = True) -> Inputs:
    """An input as tensors: pictures UInt8[c h w], numbers as they are, half precision as float32."""
    if isinstance(value, Mapping):
        if not value:
            raise InputError(f"{where}: its input is an empty mapping")
        return {str(key): _as_tensor(f"{where}: {key!r}", part, pictures) for key, part in value.items()}
    return _as_tensor(where, value, pictures)


def _as_tensor(where: str, value: Any, pictures: bool) -> Tensor:
    if isinstance(value, Image.Image):
        return torch.from_numpy(pillow_pixels(where, value))
    if isinstance(value, tuple) and any(isinstance(one, Tensor | np.ndarray) for one in value):
        raise InputError(f"{where}: its input is a tuple; give one tensor, or a mapping of tensors by name")
    if isinstance(value, np.ndarray) or (isinstance(value, list) and value):
        try:
            array = np.asarray(value)
        except ValueError:
            array = np.empty(0, object)
        if array.dtype.kind not in "biuf":
            raise InputError(f"{where}: its input must be numbers, found {shown(value)}")
        if array.dtype in (np.uint16, np.uint32, np.uint64):
            array = array.astype(np.int64)
        if pictures and array.dtype == np.uint8 and array.ndim == 3 and _channels_last(array.shape):
            array = array.transpose(2, 0, 1)
        tensor = torch.from_numpy(np.ascontiguousarray(array))
    elif isinstance(value, Tensor):
        tensor = value.detach()
        if pictures and tensor.dtype == torch.uint8 and tensor.ndim == 3 and tensor.shape[0] not in (1, 3):
            tensor = tensor.permute(2, 0, 1) if _channels_last(tuple(tensor.shape)) else tensor
    else:
        raise InputError(
            f"{where}: its input must be an image, a tensor, an array or a mapping of such, found "
            f"{shown(value)}"
        )
    if pictures and tensor.dtype == torch.uint8 and tensor.ndim == 2:
        tensor = tensor[None]
    if tensor.dtype in (torch.float16, torch.bfloat16):
        tensor = tensor.float()
    return tensor.cpu().contiguous()


def _channels_last(shape: tuple[int, ...]) -> bool:
    return shape[2] in (1, 3)


def check_finite(inputs: Inputs, where: Callable[[int], str], *, rows: bool = True) -> None:
    """That all floats are finite; `rows` is whether the first dimension counts rows."""
    for part in [inputs] if isinstance(inputs, Tensor) else inputs.values():
        if part.is_floating_point() and not bool(part.isfinite().all()):
            row = int((~part.isfinite()).flatten(1).any(1).nonzero()[0]) if rows else 0
            raise InputError(f"{where(row)}: an input is NaN or infinite; repair or remove the row")


def shape_of(inputs: Inputs, *, rows: bool = True) -> Shape:
    """The shape of one input; `rows` is whether the first dimension counts rows."""
    if isinstance(inputs, Tensor):
        return tuple(inputs.shape[rows:])
    return {name: tuple(part.shape[rows:]) for name, part in inputs.items()}


def _refuse_whole_pixels(where: str, one: Inputs) -> None:
    if isinstance(one, Tensor) and one.ndim == 3 and not one.is_floating_point() and one.dtype != torch.uint8:
        raise InputError(
            f"{where}: pixels of type {one.dtype}; convert them to uint8, or to float as trained"
        )


def checksum(inputs: Inputs, place: int) -> int:
    """The checksum of one row, which is never 0."""
    found = 0
    for part in [inputs] if isinstance(inputs, Tensor) else inputs.values():
        found = zlib.crc32(np.ascontiguousarray(part[place].numpy()).data, found)
    return found or 1


def _told(shape: Shape) -> str:
    return str(dict(shape) if isinstance(shape, Mapping) else tuple(shape))


def content(inputs: Inputs) -> bytes:
    """The bytes of all tensors."""
    parts = {"": inputs} if isinstance(inputs, Tensor) else inputs
    return b"".join(content_of(part) for part in parts.values())


def changes(where: str) -> str:
    """The message about a row that is not the same twice."""
    return (
        f"{where}: the input changes when it is read again; give the dataset without random transforms, as "
        "the image that was trained on must be known"
    )
