"""`load` and `load_examples`: a data set of any of the formats, by one word or path."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from unpoison._memory import allowed_memory
from unpoison._progress import Progress
from unpoison.data._cifar import find_cifar, read_cifar
from unpoison.data._dataset_examples import DatasetExamples, Identity
from unpoison.data._folder import list_folder
from unpoison.data._image_files import Files, Transform, pictures_of
from unpoison.data._images import AS_THEY_ARE, Preparation
from unpoison.data._manifest import (
    is_manifest,
    is_saved_dataset,
    list_manifest,
    list_shards,
    read_saved_dataset,
)
from unpoison.data._npz import read_npz
from unpoison.data._sample import sample
from unpoison.data._splits import Splits
from unpoison.data._training_set import TrainingSet
from unpoison.errors import InputError

HELD_SHARE = 0.25
"""The share of the memory that may be taken which the images of files may take by default."""

_KNOWN = (
    "'sample', a folder of class folders, an .npz, a .parquet file, folder or pattern, a .csv of paths and "
    "labels, .tar shards, or the folder of a CIFAR archive"
)
_Read = TypeVar("_Read", TrainingSet, DatasetExamples)


def load(
    spec: str | os.PathLike[str],
    *,
    test: str | os.PathLike[str] | None = None,
    size: int | None = None,
    orient: bool = False,
) -> Splits[TrainingSet]:
    """Read a data set of any known format into memory.

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
    preparation = Preparation(size, orient)
    train, *more = (
        _held(one, preparation, _files(one, preparation)) for one in (spec, test) if one is not None
    )
    return _with_test(train, *more) if more else train


def load_examples(
    spec: str | os.PathLike[str],
    *,
    test: str | os.PathLike[str] | None = None,
    size: int | None = None,
    orient: bool = False,
    transform: Transform | None = None,
    held_share: float = HELD_SHARE,
    workers: int = 0,
    identity: Identity = "cheap",
    cache: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Splits[TrainingSet] | Splits[DatasetExamples]:
    """Read a data set into memory where it fits, and otherwise batch by batch as it is needed.

    Image files (folders, tables of paths, tar shards) are decoded batch by batch if together they take more
    than `held_share` of the memory that may be taken. With a transform every set is read so, of any format.

    Arguments:
        spec: as for `load`.
        test: as for `load`; it is read as the training set is.
        size: as for `load`; a transform brings pictures to a size by itself.
        orient: as for `load`; before the transform.
        transform: from a picture of Pillow in RGB, as torchvision and timm load it, to what the network was
            trained on; the same at every call.
        held_share: hold 8-bit images that take no more than this share of the memory that may be taken (nine
            tenths of what is free, unless a limit is set); 0 holds none.
        workers: processes that decode ahead, as for `DatasetExamples`.
        identity: what the fingerprint of a set that is not held is made of, as for `DatasetExamples`.
        cache: a folder for what was decoded, as for `DatasetExamples`.
        progress: told of what is read before anything else.

    Raises:
        InputError: as `load` and `DatasetExamples`; or there is a transform and a size.
    """
    if transform is not None and size is not None:
        raise InputError(f"{spec}: a transform resizes by itself; leave out size (--size)")
    if not 0 <= held_share <= 1:
        raise InputError(f"{spec}: the share of the memory must lie in [0, 1], found {held_share:g}")
    preparation = Preparation(size, orient)
    specs = [spec] if test is None else [spec, test]
    listed = [_files(one, preparation) for one in specs]
    allowed = _allowed_bytes(held_share)
    options: dict[str, Any] = {
        "workers": workers,
        "memory_bytes": allowed,
        "identity": identity,
        "cache": cache,
        "progress": progress,
    }
    parts: list[Splits[Any]]
    if transform is not None:
        parts = [
            pictures_of(_held(one, preparation), transform, **options)
            if files is None
            else files.transformed(transform).lazily(**options)
            for one, files in zip(specs, listed, strict=True)
        ]
        note = f"images are what {_named(transform)} makes of the pictures"
    else:
        note = _too_much(listed, held_share, allowed)
        parts = [
            _held(one, preparation, files) if files is None or not note else files.lazily(**options)
            for one, files in zip(specs, listed, strict=True)
        ]
    splits = parts[0] if test is None else _with_test(*parts)
    return replace(splits, notes=(*splits.notes, note)) if note else splits


def _allowed_bytes(share: float) -> int:
    """How much memory a set may take."""
    return int(share * allowed_memory())


def _too_much(listed: Sequence[Files | None], share: float, allowed: int) -> str:
    """Why image files are not held in memory; "" where they may be."""
    takes = sum(files.held_bytes() for files in listed if files is not None)
    if takes <= allowed:
        return ""
    return (
        f"images are decoded as they are read, batch by batch: in memory they take {takes / 1e6:,.1f} MB, "
        f"more than {share:g} of what may be taken"
    )


def _named(transform: Transform) -> str:
    kind = type(transform) if not hasattr(transform, "__qualname__") else transform
    return f"{kind.__module__}:{kind.__qualname__}"


def _with_test(splits: Splits[_Read], more: Splits[_Read]) -> Splits[_Read]:
    """The training set of each, the other's as the test set."""
    test: Any = more.train
    name = f"{test.name} (test)"
    test = replace(test, name=name) if isinstance(test, TrainingSet) else test.renamed(name)
    return Splits(splits.train, test, (*splits.notes, *more.notes))


def _held(
    spec: str | os.PathLike[str], preparation: Preparation, files: Files | None = None
) -> Splits[TrainingSet]:
    """A set of any format in memory, of the image files that are listed already, or of another format."""
    if files is not None:
        return files.held()
    if preparation != AS_THEY_ARE:
        raise InputError(f"{spec}: is no folder or list of image files, which size and orientation are for")
    if spec == "sample":
        return sample()
    path = Path(spec)
    suffix = path.suffix.lower()
    if path.is_dir() and find_cifar(path) is not None:
        return read_cifar(path)
    if path.is_dir() and is_saved_dataset(path):
        return read_saved_dataset(path)
    if path.is_dir() or suffix == ".parquet" or (not path.exists() and glob.has_magic(str(spec))):
        # Here, since importing pyarrow takes a third of a second.
        from unpoison.data._parquet import read_parquet

        return read_parquet(path)
    if suffix == ".npz":
        return read_npz(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; give {_KNOWN}")
    raise InputError(f"{path}: its format is not known; give {_KNOWN}")


def _files(spec: str | os.PathLike[str], preparation: Preparation) -> Files | None:
    """A set of image files, of which none is read; None for the other formats."""
    path = Path(spec)
    suffix = path.suffix.lower()
    if spec == "sample" or (path.is_dir() and (find_cifar(path) is not None or is_saved_dataset(path))):
        return None
    if suffix == ".tar" or (path.is_dir() and any(path.glob("*.tar"))):
        return list_shards(path, preparation)
    if suffix in (".csv", ".tsv") or (suffix == ".parquet" and path.is_file() and is_manifest(path)):
        return list_manifest(path, preparation)
    if path.is_dir() and not (any(path.glob("*.parquet")) or any(path.glob("data/*.parquet"))):
        return list_folder(path, preparation)
    return None
