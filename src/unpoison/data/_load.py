"""`load`: a data set of any of the formats, by one word or path."""

from __future__ import annotations

import glob
import os
from dataclasses import replace
from pathlib import Path

from unpoison.data._cifar import find_cifar, read_cifar
from unpoison.data._folder import read_folder
from unpoison.data._npz import read_npz
from unpoison.data._sample import sample
from unpoison.data._splits import Splits
from unpoison.errors import InputError

_KNOWN = (
    "'sample', a folder of class folders, an .npz, a .parquet file, folder or pattern, or the "
    "folder of a CIFAR archive"
)


def load(spec: str | os.PathLike[str], *, test: str | os.PathLike[str] | None = None) -> Splits:
    """Read a data set of any known format.

    Arguments:
        spec: `sample` for the bundled set; an `.npz` file; a `.parquet` file, a pattern of such files or a
            folder of them; the folder of an extracted CIFAR archive; or a folder of class folders.
        test: where the test set lies, in any of the formats, if not in `spec`; its training examples are
            taken. It must have the same classes and image shape.

    Raises:
        InputError: there is nothing there, its format is not known, or it cannot be read.

    >>> splits = load("sample")
    >>> splits.train.class_counts().tolist()
    [500, 500, 500, 500, 500, 500, 500, 500, 500, 500]
    """
    splits = _load(spec)
    if test is None:
        return splits
    other = _load(test).train
    return Splits(splits.train, replace(other, name=f"{other.name} (test)"))


def _load(spec: str | os.PathLike[str]) -> Splits:
    if spec == "sample":
        return sample()
    path = Path(spec)
    suffix = path.suffix.lower()
    if path.is_dir():
        if find_cifar(path) is not None:
            return read_cifar(path)
        if not (any(path.glob("*.parquet")) or any(path.glob("data/*.parquet"))):
            return read_folder(path)
    if path.is_dir() or suffix == ".parquet" or (not path.exists() and glob.has_magic(str(spec))):
        # Here, since importing pyarrow takes a third of a second.
        from unpoison.data._parquet import read_parquet

        return read_parquet(path)
    if suffix == ".npz":
        return read_npz(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; give {_KNOWN}")
    raise InputError(f"{path}: its format is not known; give {_KNOWN}")
