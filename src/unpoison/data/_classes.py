"""Checks of labels and class names as readers find them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unpoison.errors import InputError


def as_labels(where: str, array: np.ndarray[Any, Any]) -> Tensor:
    """Int64[n] from integers of shape [n] or [n, 1]; `where` is what to call the array in messages."""
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise InputError(
            f"{where}: labels must have shape [n], found {array.shape}; give class numbers, not one-hot"
        )
    if array.dtype.kind == "f" and np.isnan(array).any():
        row = int(np.isnan(array).argmax())
        raise InputError(f"{where}: row {row}: label is NaN; give it a class number")
    if array.dtype.kind not in "iu":
        raise InputError(f"{where}: labels must be whole numbers, found {array.dtype}; convert them to int64")
    outside = (array < 0) | (array > 2**31)
    if outside.any():
        row = int(outside.argmax())
        raise InputError(
            f"{where}: row {row}: label {array[row]} is out of range; classes are numbered from 0"
        )
    return torch.from_numpy(array.astype(np.int64))


def as_class_names(where: str, names: Any) -> tuple[str, ...]:
    """Class names as text, from any sequence of names or numbers.

    Raises:
        InputError: it is no sequence.

    >>> as_class_names("set", [0, 1])
    ('0', '1')
    """
    if isinstance(names, np.ndarray | Tensor):
        names = names.tolist()
    if isinstance(names, str | bytes | Mapping) or not isinstance(names, Iterable):
        raise InputError(f"{where}: class names must be a list of text, found {names!r:.60}")
    return tuple(name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name) for name in names)


def class_names_or_numbers(where: str, names: Any, labels: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The names given, or "0", "1", ... up to the largest label; every label must have a name.

    Arguments:
        where: what to call the whole set in messages.
        names: the class names, if the source has them.
        labels: Int64[k] of each part, by what to call the part.
    """
    if names is None:
        count = max((int(part.max()) + 1 for part in labels.values() if len(part)), default=0)
        if count > 1_000_000:
            raise InputError(
                f"{where}: the largest label is {count - 1}; classes are numbered from 0 without gaps"
            )
        names = range(count)
    given = as_class_names(where, names)
    if len(given) < 2:
        raise InputError(f"{where}: needs at least two classes, found {len(given)}")
    for part, values in labels.items():
        outside = values >= len(given)
        if bool(outside.any()):
            row = int(outside.nonzero()[0])
            raise InputError(f"{part}: row {row}: label {int(values[row])} is outside 0..{len(given) - 1}")
    return given
