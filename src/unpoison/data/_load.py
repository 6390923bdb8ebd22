"""`load`: a data set of any of the formats, by one word or path."""

from __future__ import annotations

import glob
import os
from dataclasses import replace
from pathlib import Path

from unpoison.data._cifar import find_cifar, read_cifar
from unpoison.data._folder import read_folder
from unpoison.data._manifest import (
    is_manifest,
    is_saved_dataset,
    read_manifest,
    read_saved_dataset,
    read_shards,
)
from unpoison.data._npz import read_npz
from unpoison.data._sample import sample
from unpoison.data._splits import Splits
from unpoison.errors import InputError

_KNOWN = (
    "'sample', a folder of class folders, an .npz, a .parquet file, folder or pattern, a .csv of paths and "
    "labels, .tar shards, or the folder of a CIFAR archive"
)


def load(
    spec: str | os.PathLike[str],
    *,
    test: str | os.PathLike[str] | None = None,
    size: int | None = None,
    orient: bool = False,
) -> Splits:
    """Read a data set of any known format.

    Arguments:
        spec: `sample` for the bundled set; an `.npz` file; a `.parquet` file, a pattern of such files or a
            folder of them; a `.csv` or `.parquet` table of paths and labels; a `.tar` file or a folder of
            them; a folder of `save_to_disk`; the folder of an extracted CIFAR archive; or a folder of class
            folders.
        test: where the test set lies, in any of the formats, if not in `spec`; its training examples are
            taken. It must have the same classes and image shape.
        size: resize the shorter side of every image to so many pixels and cut out the middle square; for
            image files alone.
        orient: turn photographs as their EXIF orientation says; for image files alone.

    Raises:
        InputError: there is nothing there, its format is not known, or it cannot be read.

    >>> splits = load("sample")
    >>> splits.train.class_counts().tolist()
    [500, 500, 500, 500, 500, 500, 500, 500, 500, 500]
    """
    splits = _load(spec, size, orient)
    if test is None:
        return splits
    more = _load(test, size, orient)
    other = more.train
    return Splits(splits.train, replace(other, name=f"{other.name} (test)"), (*splits.notes, *more.notes))


def _load(spec: str | os.PathLike[str], size: int | None, orient: bool) -> Splits:
    splits = _files(spec, size, orient)
    if splits is not None:
        return splits
    if size is not None or orient:
        raise InputError(f"{spec}: is no folder or list of image files, which size and orientation are for")
    if spec == "sample":
        return sample()
    path = Path(spec)
    suffix = path.suffix.lower()
    if path.is_dir() and find_cifar(path) is not None:
        return read_cifar(path)
    if path.is_dir() or suffix == ".parquet" or (not path.exists() and glob.has_magic(str(spec))):
        # Here, since importing pyarrow takes a third of a second.
        from unpoison.data._parquet import read_parquet

        return read_parquet(path)
    if suffix == ".npz":
        return read_npz(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; give {_KNOWN}")
    raise InputError(f"{path}: its format is not known; give {_KNOWN}")


def _files(spec: str | os.PathLike[str], size: int | None, orient: bool) -> Splits | None:
    """A set of image files; None for the other formats."""
    path = Path(spec)
    suffix = path.suffix.lower()
    if spec == "sample" or (path.is_dir() and find_cifar(path) is not None):
        return None
    table = suffix in (".csv", ".tsv") or (suffix == ".parquet" and path.is_file())
    shards = suffix == ".tar" or (path.is_dir() and any(path.glob("*.tar")))
    if table or shards or (path.is_dir() and is_saved_dataset(path)):
        if shards:
            return read_shards(path, size=size, orient=orient)
        if path.is_dir():
            return read_saved_dataset(path)
        if suffix != ".parquet" or is_manifest(path):
            return read_manifest(path, size=size, orient=orient)
        return None
    if path.is_dir() and not (any(path.glob("*.parquet")) or any(path.glob("data/*.parquet"))):
        return read_folder(path, size=size, orient=orient)
    return None
