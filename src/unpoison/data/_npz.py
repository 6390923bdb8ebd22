"""Training sets as NumPy archives: `read_npz` and `write_npz`.

An archive holds arrays of plain numbers and text only; nothing in it is unpickled. Archives of other tools
are read when they use one of the common pairs of names (`images`/`labels` or `x_train`/`y_train`, each with a
test pair if there is one). Those of `write_npz` also state their layout, so that no shape is ambiguous.
"""

from __future__ import annotations

import contextlib
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.lib import format as npy_format
from torch import Tensor

from unpoison._artefacts import atomic_file
from unpoison._memory import check_memory
from unpoison.data._classes import as_class_names, as_labels, class_names_or_numbers
from unpoison.data._grid import eight_bit, grid_tolerance
from unpoison.data._splits import Splits
from unpoison.data._training_set import TrainingSet
from unpoison.errors import InputError, one_line

_NAMES = (
    ("images", "labels", "test_images", "test_labels"),
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("x", "y", "x_test", "y_test"),
)
_LAYOUTS = ("NCHW", "NHWC", "NHW")


def write_npz(
    path: str | os.PathLike[str],
    training_set: TrainingSet,
    test: TrainingSet | None = None,
    *,
    compress: bool = True,
) -> None:
    """Write a training set, and its test set if given, as one NumPy archive.

    Arguments:
        path: the file to write; it appears whole or not at all.
        training_set: written as `images` UInt8[n c h w], `labels` Int64[n], `class_names` and `layout`
            "NCHW".
        test: written as `test_images` and `test_labels`; it must have the classes and shape of
            `training_set`.
        compress: deflate the arrays; an archive to be read with `memory_map` must not be compressed.

    Raises:
        InputError: the test set does not match, or the file cannot be written.
    """
    Splits(training_set, test)
    target = Path(path)
    if target.suffix.lower() != ".npz":
        raise InputError(f"{target}: the name of a NumPy archive must end in .npz")
    arrays = {
        "images": training_set.images.cpu().contiguous().numpy(),
        "labels": training_set.labels.cpu().contiguous().numpy(),
        "class_names": np.array(training_set.class_names, dtype=np.str_),
        "layout": np.array("NCHW"),
    }
    if test is not None:
        arrays["test_images"] = test.images.cpu().contiguous().numpy()
        arrays["test_labels"] = test.labels.cpu().contiguous().numpy()
    compression = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    try:
        with (
            atomic_file(target) as staging,
            zipfile.ZipFile(staging, "w", compression, compresslevel=9 if compress else None) as archive,
        ):
            for name, array in arrays.items():
                # A fixed date, so that equal content gives equal files.
                entry = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
                entry.compress_type = compression
                with archive.open(entry, "w", force_zip64=True) as member:
                    npy_format.write_array(member, array, allow_pickle=False)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror or error})") from None


def read_npz(path: str | os.PathLike[str], *, memory_map: bool = False) -> Splits[TrainingSet]:
    """Read a NumPy archive of images and labels.

    The arrays are `images` and `labels` (or `x_train` and `y_train`, `train_images` and `train_labels`, `x`
    and `y`), with `test_images` and `test_labels` (or `x_test` and `y_test`) for the test set, and may be
    joined by `class_names` (text) and `layout` ("NCHW", "NHWC" or "NHW"). Without `layout` the dimension of
    size 1 or 3 is taken to be the channels. Images are uint8, or float in [0, 1] whose values are multiples
    of 1/255. Labels are integers of shape [n] or [n, 1]. Without `class_names` the classes are called "0",
    "1", ...

    Arguments:
        path: the archive.
        memory_map: map the images from disk. Needs uint8 images in an archive that is not compressed
            (`write_npz(..., compress=False)`). Labels are read into memory. The map is private: writing to
            the tensor never changes the file. Checksums are not verified.

    Raises:
        InputError: the file cannot be read, an array is missing or of the wrong kind, a pixel is NaN or off
            the 8-bit grid, a label is out of range, or there are fewer than two classes.
    """
    source = Path(path)
    try:
        with zipfile.ZipFile(source) as archive:
            return _read(source, archive, memory_map=memory_map)
    except FileNotFoundError:
        raise InputError(f"{source}: no such file") from None
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, struct.error) as error:
        raise InputError(
            f"{source}: cannot be read as a NumPy archive ({one_line(error)}); it may be cut short or of "
            "another kind"
        ) from None


def _read(source: Path, archive: zipfile.ZipFile, *, memory_map: bool) -> Splits[TrainingSet]:
    present = {name.removesuffix(".npy") for name in archive.namelist()}
    for names in _NAMES:
        if present >= {*names[:2]}:
            break
    else:
        for names in _NAMES:
            if present & {*names[:2]}:
                found = next(name for name in names[:2] if name in present)
                missing = next(name for name in names[:2] if name not in present)
                raise InputError(f"{source}: has {found!r} but no array {missing!r}; add it to the archive")
        raise InputError(
            f"{source}: no arrays 'images' and 'labels' (nor 'x_train' and 'y_train') among "
            f"{sorted(present)[:8]}"
        )
    layout = str(_array(source, archive, "layout")) if "layout" in present else None
    if layout is not None and layout not in _LAYOUTS:
        raise InputError(f"{source}: layout {layout!r} is none of {', '.join(_LAYOUTS)}")

    with_test = names[2] in present or names[3] in present
    if with_test and not present >= {*names[2:]}:
        missing = next(name for name in names[2:] if name not in present)
        raise InputError(f"{source}: a test set needs an array {missing!r} too")
    images = {}
    labels = {}
    for images_name, labels_name in (names[:2], names[2:]) if with_test else (names[:2],):
        array = _mapped(source, archive, images_name) if memory_map else _array(source, archive, images_name)
        images[images_name] = _as_images(source, images_name, array, layout, memory_map=memory_map)
        labels[labels_name] = as_labels(f"{source}: {labels_name}", _array(source, archive, labels_name))
        if len(images[images_name]) != len(labels[labels_name]):
            raise InputError(
                f"{source}: {len(images[images_name])} {images_name} but {len(labels[labels_name])} "
                f"{labels_name}; give one label an image"
            )
    given = None
    if "class_names" in present:
        named = _array(source, archive, "class_names")
        if named.ndim != 1 or named.dtype.kind not in "USiu":
            raise InputError(
                f"{source}: class_names must be a list of text, found {named.dtype} {named.shape}"
            )
        given = as_class_names(str(source), named)
    class_names = class_names_or_numbers(
        str(source), given, {f"{source}: {name}": values for name, values in labels.items()}
    )

    train = TrainingSet(images[names[0]], labels[names[1]], class_names, str(source))
    if not with_test:
        return Splits(train)
    return Splits(train, TrainingSet(images[names[2]], labels[names[3]], class_names, f"{source} (test)"))


def _array(source: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray[Any, Any]:
    """One array of the archive, read into memory."""
    size = archive.getinfo(f"{name}.npy").file_size
    check_memory(
        f"{source}: {name}",
        {"the array": size},
        advice="write it without compression and give read_npz(path, memory_map=True), or a part of it",
    )
    with archive.open(f"{name}.npy") as member, _readable(source, name):
        return np.asarray(npy_format.read_array(member, allow_pickle=False))


@contextlib.contextmanager
def _readable(source: Path, name: str) -> Iterator[None]:
    """Whatever NumPy raises for a damaged array, as one `InputError`; damage of the archive is raised on."""
    try:
        yield
    except (InputError, MemoryError, OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError):
        raise
    # NumPy parses the header as Python, so errors of the tokenizer and the parser are among them.
    except Exception as error:
        if "pickle" in str(error) or "Object" in str(error):
            problem = "holds Python objects, which are never unpickled; save an array of numbers"
        else:
            problem = f"cannot be read as an array ({one_line(error)})"
        raise InputError(f"{source}: {name}: {problem}") from None


def _mapped(source: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray[Any, Any]:
    """One array of the archive as a private memory map of the bytes in the file."""
    entry = archive.getinfo(f"{name}.npy")
    if entry.compress_type != zipfile.ZIP_STORED:
        raise InputError(
            f"{source}: {name}: is compressed and cannot be memory-mapped; write it with compress=False, or "
            "read it without memory_map"
        )
    with source.open("rb") as file, _readable(source, name):
        file.seek(entry.header_offset)
        header = file.read(30)
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        file.seek(entry.header_offset + 30 + name_length + extra_length)
        version = npy_format.read_magic(file)
        read = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
        shape, fortran_order, dtype = read(file)
        if dtype != np.uint8:
            raise InputError(f"{source}: {name}: only uint8 images can be memory-mapped, found {dtype}")
        if int(np.prod(shape)) == 0:
            return np.empty(shape, dtype)
        order: Literal["F", "C"] = "F" if fortran_order else "C"
        return np.memmap(source, dtype, mode="c", offset=file.tell(), shape=shape, order=order)


def _as_images(
    source: Path, name: str, array: np.ndarray[Any, Any], layout: str | None, *, memory_map: bool
) -> Tensor:
    """UInt8[n c h w] from any of the layouts; a view when the bytes allow it."""
    where = f"{source}: {name}"
    if layout is None:
        layout = _guess_layout(where, array.shape)
    if array.ndim != len(layout):
        raise InputError(f"{where}: must have {len(layout)} dimensions ({layout}), found shape {array.shape}")
    if layout == "NHW":
        array = array[:, None]
    elif layout == "NHWC":
        array = array.transpose(0, 3, 1, 2)
    if array.shape[1] not in (1, 3):
        raise InputError(f"{where}: images must have 1 or 3 channels, found {array.shape[1]} ({layout})")
    if array.dtype == np.uint8:
        pixels = array if memory_map else np.ascontiguousarray(array)
        return torch.from_numpy(pixels)
    if array.dtype.kind != "f":
        raise InputError(f"{where}: pixels must be uint8 or float in [0, 1], found {array.dtype}")
    pixels = eight_bit(
        lambda row: f"{where}: row {row}",
        array,
        tolerance=grid_tolerance(array.dtype),
        if_outside="give uint8, or float in [0, 1]",
        if_between="give the images as uint8",
    )
    return torch.from_numpy(pixels)


def _guess_layout(where: str, shape: tuple[int, ...]) -> str:
    if len(shape) == 3:
        return "NHW"
    if len(shape) != 4:
        raise InputError(f"{where}: images must have shape NHWC, NCHW or NHW, found {shape}")
    first, last = shape[1] in (1, 3), shape[3] in (1, 3)
    if first == last:
        found = "both the second and the last" if first else "neither the second nor the last"
        raise InputError(
            f"{where}: shape {shape}: {found} dimension could be the 1 or 3 channels; add an array "
            "'layout' with the text 'NHWC' or 'NCHW'"
        )
    return "NCHW" if first else "NHWC"
