"""The extracted Python archives of CIFAR-10 and CIFAR-100: `read_cifar`.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009). The archives are pickles, and are
read by the restricted unpickler, which refuses anything but arrays.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unpoison.data._classes import as_labels, class_names_or_numbers
from unpoison.data._restricted_unpickler import read_pickle
from unpoison.data._splits import Splits
from unpoison.data._training_set import TrainingSet
from unpoison.errors import InputError

_SUBFOLDERS = ("cifar-10-batches-py", "cifar-100-python")


def find_cifar(folder: Path) -> Path | None:
    """The folder with the pickles: the one given, or the one that the archive makes inside it, or None."""
    candidates = (folder, *(folder / name for name in _SUBFOLDERS))
    return next((one for one in candidates if _is_ten(one) or _is_hundred(one)), None)


def read_cifar(path: str | os.PathLike[str]) -> Splits[TrainingSet]:
    """Read an extracted CIFAR-10 or CIFAR-100 archive ("python version").

    CIFAR-10 is five files `data_batch_1` to `data_batch_5`, `test_batch` and `batches.meta`; CIFAR-100 is
    `train`, `test` and `meta`, of which the 100 fine labels are read.

    Arguments:
        path: the folder with these files, or the one above it.

    Raises:
        InputError: a file is missing, is cut short, lacks an entry, or asks for anything but arrays and
            containers.
    """
    given = Path(path)
    folder = find_cifar(given)
    if folder is None:
        raise InputError(f"{given}: holds neither data_batch_1 (CIFAR-10) nor train and meta (CIFAR-100)")
    if _is_ten(folder):
        train_files = [folder / f"data_batch_{number}" for number in range(1, 6)]
        test_file, meta_file = folder / "test_batch", folder / "batches.meta"
        labels_key, names_key = "labels", "label_names"
    else:
        train_files, test_file, meta_file = [folder / "train"], folder / "test", folder / "meta"
        labels_key, names_key = "fine_labels", "fine_label_names"
    names = _entry(meta_file, _mapping(meta_file), names_key)

    def training_set(files: list[Path], name: str) -> TrainingSet:
        parts = [_batch(file, labels_key) for file in files]
        by_file = {str(file): labels for file, (_, labels) in zip(files, parts, strict=True)}
        return TrainingSet(
            torch.cat([images for images, _ in parts]),
            torch.cat([labels for _, labels in parts]),
            class_names_or_numbers(f"{meta_file}: {names_key}", names, by_file),
            name,
        )

    train = training_set(train_files, str(folder))
    return Splits(train, training_set([test_file], str(test_file)) if test_file.exists() else None)


def _is_ten(folder: Path) -> bool:
    return (folder / "data_batch_1").is_file()


def _is_hundred(folder: Path) -> bool:
    return (folder / "meta").is_file() and (folder / "train").is_file()


def _batch(file: Path, labels_key: str) -> tuple[Tensor, Tensor]:
    """The images UInt8[n 3 32 32] and labels of one file."""
    content = _mapping(file)
    data = np.asarray(_entry(file, content, "data"))
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        raise InputError(
            f"{file}: data: must be uint8 of shape [n, 3072], found {data.dtype} of shape {data.shape}"
        )
    numbers = _entry(file, content, labels_key)
    try:
        labels = as_labels(f"{file}: {labels_key}", np.asarray(numbers))
    except (ValueError, TypeError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: {labels_key}: must be a list of whole numbers") from None
    if len(labels) != len(data):
        raise InputError(
            f"{file}: has {len(data)} images but {len(labels)} labels; extract the archive again"
        )
    return torch.from_numpy(np.ascontiguousarray(data).reshape(-1, 3, 32, 32)), labels


def _mapping(file: Path) -> Mapping[Any, Any]:
    content = read_pickle(file)
    if not isinstance(content, dict):
        raise InputError(f"{file}: must hold a mapping, found {type(content).__name__}")
    return content


def _entry(file: Path, content: Mapping[Any, Any], key: str) -> Any:
    for spelling in (key.encode(), key):
        if spelling in content:
            return content[spelling]
    raise InputError(f"{file}: lacks the entry {key!r}; extract the archive again")
