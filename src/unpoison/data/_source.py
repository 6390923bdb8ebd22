"""`Source`: a map-style dataset of the user's own, row by row, and what the dataset says of itself.

A row is split into an input, a label and an id. Which part is which is guessed (torchvision, Hugging Face,
timm, TensorDataset) or told. Class names, labels and file names are taken from the dataset where it has them,
through `Subset` and `ConcatDataset`, so that labels need not be collected by reading every input.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol, final, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from unpoison.data._classes import as_class_names
from unpoison.errors import InputError, one_line

Part = int | str
"""A place in a row that is a tuple, or a key of a row that is a mapping."""

INPUT_KEYS: Final = ("pixel_values", "image", "img", "images", "input_values", "inputs", "input", "x")
LABEL_KEYS: Final = ("label", "labels", "fine_label", "target", "targets", "class", "y")
_SAMPLED: Final = 64


@runtime_checkable
class MapStyle(Protocol):
    """A map-style dataset, as PyTorch calls it: examples with a count and an index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@final
class Source:
    """Rows of a dataset.

    Arguments:
        dataset: anything with `len()` and `[index]`; a pair of arrays (inputs, labels) of one length also is.
        inputs: which part of a row is the input, where that is not to be guessed.
        labels: which part is the label, or the labels of all rows: numbers or names.
        ids: which part is the id, or the ids of all rows.
        collate_fn: makes a batch of rows; parts are then those of a batch.
        name: what to call the set in messages; by default the name of the dataset's type.

    Raises:
        InputError: it is no map-style dataset, it is empty, or a part of its rows is missing.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        inputs: Part | None = None,
        labels: Part | Sequence[Any] | Tensor | None = None,
        ids: Part | Sequence[str] | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        name: str | None = None,
    ) -> None:
        self.name = name or type(dataset).__name__
        self.dataset = _opened(self.name, dataset)
        self.count = _length(self.name, self.dataset)
        self.collate_fn = collate_fn
        self._given_labels = None if isinstance(labels, int | str) else labels
        self._given_ids = None if isinstance(ids, int | str) else ids
        for what, given in (("labels", self._given_labels), ("ids", self._given_ids)):
            if given is not None and len(given) != self.count:
                raise InputError(f"{self.name}: {len(given)} {what} for {self.count} rows")
        self.input_part = inputs
        self.label_part = labels if isinstance(labels, int | str) else None
        self.id_part = ids if isinstance(ids, int | str) else None
        if self._given_labels is None or inputs is None:
            self._guess()
        features = getattr(self.dataset, "features", None)
        column = features.get(self.input_part) if isinstance(features, Mapping) else None
        self._of_bytes = getattr(column, "dtype", None) == "uint8"

    def __len__(self) -> int:
        return self.count

    def row(self, index: int) -> Any:
        """A row as the dataset gives it.

        Raises:
            InputError: the dataset raised an error.
        """
        try:
            return self.dataset[index]
        except InputError:
            raise
        except Exception as error:
            told = one_line(error) or type(error).__name__
            if isinstance(error, IndexError) and index < self.count:
                told += f"; its length is given as {self.count}"
            raise InputError(
                f"{self.name}: row {index}: cannot be read ({type(error).__name__}: {told})"
            ) from error

    def input_of(self, where: str, row: Any) -> Any:
        """The input in a row, or in what a `collate_fn` made of several."""
        if self.input_part is not None:
            found = _part(where, row, self.input_part)
            # The formats of Hugging Face give whole numbers of any size as int64.
            return np.asarray(found).astype(np.uint8) if self._of_bytes and not is_picture(found) else found
        if isinstance(row, Mapping):  # of tokens: every part but the label
            return {key: value for key, value in row.items() if key not in (self.label_part, self.id_part)}
        return row

    def label_of(self, where: str, row: Any) -> Any:
        """The label in a row; None where the labels were given."""
        if self._given_labels is not None:
            return None
        assert self.label_part is not None
        return _part(where, row, self.label_part)

    def id_of(self, where: str, row: Any) -> str | None:
        """The id in a row; None where rows have none."""
        return None if self.id_part is None else str(_part(where, row, self.id_part))

    @property
    def sampled(self) -> list[int]:
        """Up to 64 rows that are spread evenly over the set."""
        last = max(self.count - 1, 0)
        places = min(self.count, _SAMPLED)
        return sorted({round(place * last / max(places - 1, 1)) for place in range(places)})

    def class_names(self) -> tuple[str, ...] | None:
        """The class names that the dataset has.

        Raises:
            InputError: the parts of a `ConcatDataset` have different ones.
        """
        return _names_through(self.name, self.dataset, self.label_part)

    def labels(self) -> Sequence[Any] | Tensor | None:
        """The labels of all rows, where they were given or the dataset has them apart from its inputs."""
        if self._given_labels is not None or self.collate_fn is not None:
            return self._given_labels
        found = _through(self.dataset, lambda leaf: _labels_of(leaf, self.label_part))
        if found is None or len(found) != self.count:
            return None
        # The dataset may change labels as it gives rows (`target_transform`).
        for index in self.sampled:
            if not _equal(found[index], self.label_of("", self.row(index))):
                return None
        return found

    def ids(self) -> Sequence[str] | None:
        """The ids of all rows, where they were given or the dataset has files."""
        if self._given_ids is not None:
            return tuple(str(one) for one in self._given_ids)
        if self.id_part is not None:
            return None
        found = _through(self.dataset, _files_of)
        return None if found is None else tuple(name for name, _ in found)

    def files(self) -> Sequence[tuple[str, Path]] | None:
        """The name and the path of the file of every row, where the dataset has files."""
        return _through(self.dataset, _files_of)

    def identity(self) -> str | None:
        """What a dataset of Hugging Face says of its content."""
        found = getattr(self.dataset, "_fingerprint", None)
        return found if isinstance(found, str) else None

    def _guess(self) -> None:
        """Which parts of a row are the input and the label, from the first row."""
        where, row = f"{self.name}: row 0", self.row(0)
        if self.collate_fn is not None:
            where, row = f"{self.name}: a batch", collated(self.name, self.collate_fn, [row])
        if isinstance(row, Mapping):
            keys = list(row)
            if self.input_part is None and "input_ids" not in keys:
                self.input_part = next((key for key in INPUT_KEYS if key in keys), None)
                if self.input_part is None:
                    raise InputError(
                        f"{where}: none of its keys ({', '.join(map(repr, keys[:8]))}) is known to hold the "
                        "input; say which by inputs= and labels="
                    )
            if self.label_part is None and self._given_labels is None:
                self.label_part = next((key for key in LABEL_KEYS if key in keys), None)
                if self.label_part is None:
                    raise InputError(
                        f"{where}: none of its keys ({', '.join(map(repr, keys[:8]))}) is known to hold the "
                        "label; say which by labels="
                    )
        elif isinstance(row, tuple | list) and len(row) > 1:
            if self.input_part is None:
                self.input_part = 0
            if self.label_part is None and self._given_labels is None:
                self.label_part = 1
        elif self._given_labels is None:
            raise InputError(
                f"{where}: must be a pair (image, label) or a mapping with both, found {type(row).__name__}; "
                "where rows are inputs alone give labels="
            )


def collated(name: str, collate_fn: Callable[[list[Any]], Any], rows: list[Any]) -> Any:
    """A batch by the user's own function.

    Raises:
        InputError: the function raised an error.
    """
    try:
        return collate_fn(rows)
    except Exception as error:
        raise InputError(
            f"{name}: its collate_fn failed ({type(error).__name__}: {one_line(error)})"
        ) from error


def as_number(where: str, label: Any) -> int | str:
    """A label as a whole number, or as the name of a class.

    Raises:
        InputError: it is neither.
    """
    value = label
    if isinstance(label, Tensor | np.ndarray) and math.prod(label.shape) == 1:
        value = label.item()
    if isinstance(value, str):
        return value
    if isinstance(value, float | np.floating) and float(value).is_integer():
        value = int(value)
    try:
        number = operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        hint = ""
        if isinstance(value, Tensor | np.ndarray | list | tuple):
            hint = "; give class numbers, not one-hot or soft labels"
        raise InputError(f"{where}: its label must be a whole number, found {shown(value)}{hint}") from None
    if not 0 <= number < 2**31:
        raise InputError(f"{where}: label {number} is out of range; classes are numbered from 0")
    return number


def as_numbers(
    called: str, labels: Iterable[Any], class_names: tuple[str, ...] | None
) -> tuple[Tensor, tuple[str, ...] | None]:
    """Int64[n] labels, and the class names where labels are names.

    Raises:
        InputError: a label is no whole number, or a name among numbers or outside the class names.
    """
    if isinstance(labels, Tensor | np.ndarray) and labels.ndim == 1:
        kind = labels.dtype.is_floating_point if isinstance(labels, Tensor) else labels.dtype.kind == "f"
        if not kind and not (isinstance(labels, np.ndarray) and labels.dtype.kind not in "iu"):
            held = labels.cpu() if isinstance(labels, Tensor) else labels
            numbers = torch.as_tensor(np.asarray(held).astype(np.int64))
            wrong = ((numbers < 0) | (numbers >= 2**31)).nonzero()
            if len(wrong):
                as_number(f"{called}: row {int(wrong[0])}", int(numbers[wrong[0]]))
            return numbers, class_names
    values = [as_number(f"{called}: row {row}", label) for row, label in enumerate(labels)]
    if not values or not isinstance(values[0], str):
        for row, value in enumerate(values):
            if isinstance(value, str):
                raise InputError(f"{called}: row {row}: its label must be a whole number, found {value!r}")
        return torch.tensor(values, dtype=torch.int64), class_names
    names = class_names
    if names is None:
        names = tuple(sorted({str(value) for value in values}))
    places = {name: place for place, name in enumerate(names)}
    for row, value in enumerate(values):
        if value not in places:
            raise InputError(
                f"{called}: row {row}: label {shown(value)} is none of the class names "
                f"{', '.join(map(repr, names[:3]))}"
            )
    return torch.tensor([places[str(value)] for value in values], dtype=torch.int64), names


def shown(value: Any) -> str:
    """A value as a message shows it."""
    return " ".join(repr(value).split())[:60]


def is_picture(value: Any) -> bool:
    """Whether this is a picture of Pillow."""
    return isinstance(value, Image.Image)


def _opened(name: str, dataset: Any) -> Any:
    """The dataset; two arrays (inputs, labels) as one."""
    if isinstance(dataset, Mapping):
        keys = [str(key) for key in dataset]
        raise InputError(
            f"{name}: is a mapping with the keys {', '.join(map(repr, keys[:6]))}; of splits give one, as "
            f"dataset[{keys[0] if keys else 'train'!r}]; of columns give the two as (inputs, labels)"
        )
    if (
        isinstance(dataset, tuple | list)
        and len(dataset) == 2
        and all(isinstance(one, Tensor | np.ndarray) for one in dataset)
        and dataset[0].ndim >= 2
        and dataset[1].ndim == 1
        and len(dataset[0]) == len(dataset[1])
    ):
        return _Arrays(*dataset)
    return dataset


@final
class _Arrays:
    """Rows of two arrays."""

    def __init__(self, inputs: Any, labels: Any) -> None:
        self.inputs, self.targets = inputs, labels

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Any:
        return self.inputs[index], self.targets[index]


def _length(name: str, dataset: Any) -> int:
    try:
        count = len(dataset) if isinstance(dataset, MapStyle) else None
    except (TypeError, ValueError, NotImplementedError):
        count = None
    if count is None:
        raise InputError(f"{name}: is not a map-style dataset; give one with len() and [index]")
    if count == 0:
        raise InputError(f"{name}: holds no examples")
    return count


def _part(where: str, row: Any, part: Part) -> Any:
    try:
        return row[part]
    except (KeyError, IndexError, TypeError):
        kind = f"the keys {', '.join(map(repr, row))}" if isinstance(row, Mapping) else type(row).__name__
        if isinstance(row, tuple | list):
            kind = f"{len(row)} parts"
        raise InputError(
            f"{where}: must be a pair (image, label) or have the part {part!r}, found {kind}"
        ) from None


def _through(dataset: Any, get: Callable[[Any], Sequence[Any] | None]) -> Sequence[Any] | None:
    """What `get` gives of a dataset, row by row through `Subset` and `ConcatDataset`."""
    if isinstance(dataset, Subset):
        inner = _through(dataset.dataset, get)
        return None if inner is None else [inner[index] for index in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [_through(part, get) for part in dataset.datasets]
        if any(part is None for part in parts):
            return None
        return [value for part in parts if part is not None for value in part]
    return get(dataset)


def _names_through(name: str, dataset: Any, label_part: Part | None) -> tuple[str, ...] | None:
    own = _names_of(name, dataset, label_part)
    if own is not None:
        return own
    if isinstance(dataset, Subset):
        return _names_through(name, dataset.dataset, label_part)
    if isinstance(dataset, ConcatDataset):
        known = {_names_through(name, part, label_part) for part in dataset.datasets} - {None}
        if len(known) > 1:
            one, other = sorted(str(list(names or ())[:3]) for names in known)[:2]
            raise InputError(
                f"{name}: its parts have different class names, {one} and {other}; bring them to one order"
            )
        return next(iter(known), None)
    return None


def _names_of(name: str, dataset: Any, label_part: Part | None) -> tuple[str, ...] | None:
    for attribute in ("classes", "class_names"):
        found = getattr(dataset, attribute, None)
        if found is not None and not callable(found):
            return as_class_names(name, found)
    features = getattr(dataset, "features", None)  # of Hugging Face
    if isinstance(features, Mapping):
        names = getattr(features.get(label_part), "names", None)
        return None if names is None else as_class_names(name, names)
    numbers = getattr(getattr(dataset, "reader", None), "class_to_idx", None)  # of timm
    if isinstance(numbers, Mapping):
        return tuple(str(one) for one in sorted(numbers, key=lambda one: int(numbers[one])))
    return None


def _labels_of(dataset: Any, label_part: Part | None) -> Sequence[Any] | None:
    if isinstance(dataset, TensorDataset):
        # A part that is not there is named when the row is split.
        known = isinstance(label_part, int) and -len(dataset.tensors) <= label_part < len(dataset.tensors)
        return dataset.tensors[label_part] if known else None  # type: ignore[index,return-value]
    features = getattr(dataset, "features", None)
    if isinstance(features, Mapping) and label_part in features and hasattr(dataset, "with_format"):
        return list(dataset.with_format(None)[label_part])
    for attribute in ("targets", "labels"):
        found = getattr(dataset, attribute, None)
        if isinstance(found, Sequence | Tensor | np.ndarray) and not isinstance(found, str):
            return found  # type: ignore[return-value]
    samples = _samples_of(dataset)
    return None if samples is None else [sample[1] for sample in samples]


def _samples_of(dataset: Any) -> Sequence[Any] | None:
    """The pairs (path, label) of torchvision and timm."""
    for holder in (dataset, getattr(dataset, "reader", None)):
        found = getattr(holder, "samples", None)
        if isinstance(found, Sequence) and found and isinstance(found[0], tuple | list) and len(found[0]) > 1:
            return found
    return None


def _files_of(dataset: Any) -> Sequence[tuple[str, Path]] | None:
    samples = _samples_of(dataset)
    if samples is None or not all(isinstance(sample[0], str | Path) for sample in samples[:1]):
        return None
    root = getattr(dataset, "root", None) or getattr(getattr(dataset, "reader", None), "root", None)
    files = []
    for sample in samples:
        path = Path(sample[0])
        inside = root is not None and path.is_relative_to(root)
        files.append(((path.relative_to(root) if inside and root else path).as_posix(), path))
    return files


def _equal(one: Any, other: Any) -> bool:
    try:
        return as_number("", one) == as_number("", other)
    except InputError:
        return False
