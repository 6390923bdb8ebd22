"""Labels and class names as the readers find them, checked before a `TrainingSet` is made of them."""

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
    if array.dtype.kind == "f":
        if np.isnan(array).any():
            raise InputError(
                f"{where}: row {int(np.isnan(array).argmax())}: label is NaN; give it a class number"
            )
        raise InputError(f"{where}: labels must be whole numbers, found {array.dtype}; convert them to int64")
    if array.dtype.kind not in "iu":
        raise InputError(f"{where}: labels must be whole numbers, found {array.dtype}; convert them to int64")
    outside = (array < 0) | (array > 2**31)
    if outside.any():
        row = int(outside.argmax())
        raise InputError(
            f"{where}: row {row}: label {array[row]} is out of range; classes are numbered from 0"
        )
    return torch.from_numpy(array.astype(np.int64))


def class_names_or_numbers(
    where: str, names: Iterable[str] | None, labels: Mapping[str, Tensor]
) -> tuple[str, ...]:
    """The names given, or "0", "1", ... up to the largest label; every label must have a name.

    Arguments:
        where: what to call the whole set in messages.
        names: the class names if the file holds them.
        labels: Int64[k] of each part, by what to call the part.
    """
    if names is None:
        count = max((int(part.max()) + 1 for part in labels.values() if len(part)), default=0)
        if count > 1_000_000:
            raise InputError(
                f"{where}: the largest label is {count - 1}; classes are numbered from 0 without gaps"
            )
        given = tuple(str(number) for number in range(count))
    else:
        given = tuple(names)
    if len(given) < 2:
        raise InputError(f"{where}: needs at least two classes, found {len(given)}")
    for part, values in labels.items():
        outside = values >= len(given)
        if bool(outside.any()):
            row = int(outside.nonzero()[0])
            raise InputError(f"{part}: row {row}: label {int(values[row])} is outside 0..{len(given) - 1}")
    return given
