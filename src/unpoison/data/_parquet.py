"""Training sets as parquet files of encoded images, in the layout of Hugging Face.

A row is an image, as the bytes of an image file, and the number of its class. The names of the classes are in
the schema's metadata.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from unpoison._artefacts import atomic_file, canonical_json
from unpoison.data._classes import as_labels, class_names_or_numbers
from unpoison.data._images import decode_all, encode_png, natural_order
from unpoison.data._splits import Splits, with_equal_channels
from unpoison.data._training_set import TrainingSet
from unpoison.errors import InputError, one_line

_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label")
_TEST = re.compile(r"(^|[-_.])(test|validation|valid|val)([-_.]|$)", re.IGNORECASE)


def write_parquet(path: str | os.PathLike[str], training_set: TrainingSet) -> None:
    """Write a training set as one parquet file: PNG images, labels, and the class names in the metadata.

    Reading it gives the same pixels. The `datasets` library reads it too. Cost: about 0.1 ms for a 32x32
    image.

    Arguments:
        path: the file to write; it appears whole or not at all.
        training_set: grey or coloured images (1 or 3 channels).

    Raises:
        InputError: the images have another number of channels, or the file cannot be written.
    """
    target = Path(path)
    names = list(training_set.class_names)
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    metadata = {"huggingface": canonical_json({"info": {"features": features}})}
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image_type), ("label", pa.int64())], metadata)
    try:
        with (
            atomic_file(target) as staging,
            pq.ParquetWriter(staging, schema) as writer,
            ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        ):
            for start in range(0, len(training_set), 1000):
                encoded = pool.map(encode_png, training_set.images[start : start + 1000].cpu())
                rows = [
                    {"image": {"bytes": content, "path": f"{start + offset}.png"}, "label": int(label)}
                    for offset, (content, label) in enumerate(
                        zip(encoded, training_set.labels[start : start + 1000].tolist(), strict=True)
                    )
                ]
                writer.write_table(pa.Table.from_pylist(rows, schema))
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror or error})") from None


def read_parquet(path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> Splits[TrainingSet]:
    """Read parquet files of encoded images and labels, in the layout of Hugging Face.

    A file has a column `image` (or `img`) of image files, as binary or as struct<bytes, path>, and a column
    `label` (or `labels` or `fine_label`) of whole numbers. The class names are those in the metadata of
    Hugging Face, else "0", "1", ... Decoding costs about 0.1 ms of one core for a 32x32 image; cores share
    the work.

    Arguments:
        path: a file, a folder of files, a pattern such as `data/cifar10-*.parquet`, or several files. Of
            several files, those with the word "test" (or "validation", "valid", "val") in their names are the
            test set; they are read in the order of the numbers in their names.

    Raises:
        InputError: a file is missing, cut short or lacks a column, an image is missing, does not decode or
            has another size, a label is missing or out of range, or there are fewer than two classes.
    """
    files, name = _files(path)
    test_files = [file for file in files if _TEST.search(file.stem)]
    train_files = [file for file in files if file not in test_files]
    if not train_files:
        train_files, test_files = test_files, []
    parts = {file: _File(file) for file in (*train_files, *test_files)}
    named = {part.class_names: file for file, part in parts.items() if part.class_names is not None}
    if len(named) > 1:
        one, other = list(named.values())[:2]
        raise InputError(f"{other}: its class names are not those of {one}; give files of one data set")
    labels = {file: part.labels() for file, part in parts.items()}
    class_names = class_names_or_numbers(
        name, next(iter(named), None), {str(file): values for file, values in labels.items()}
    )

    def training_set(files: Sequence[Path], name: str) -> TrainingSet:
        images = decode_all([image for file in files for image in parts[file].images()])
        return TrainingSet(images, torch.cat([labels[file] for file in files]), class_names, name)

    train = training_set(train_files, name)
    if not test_files:
        return Splits(train)
    return Splits(*with_equal_channels(train, training_set(test_files, f"{name} (test)")))


def image_paths(path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str]:
    """The file names of the training images in parquet files, in the order of `read_parquet`.

    They often tell which images are near-duplicates: the frames of one film, the pictures of one patient.

    Arguments:
        path: as for `read_parquet`.

    Raises:
        InputError: the images have no file names, or as `read_parquet`.
    """
    files, _ = _files(path)
    train = [file for file in files if not _TEST.search(file.stem)] or files
    return [name for file in train for name in _File(file).paths()]


class _File:
    """One parquet file, its columns found and read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with pq.ParquetFile(path) as file:
                schema = file.schema_arrow
                self._image_column = self._column(schema, _IMAGE_COLUMNS)
                self._label_column = self._column(schema, _LABEL_COLUMNS)
                self._table = file.read([self._image_column, self._label_column])
        except InputError:
            raise
        except FileNotFoundError:
            raise InputError(f"{path}: no such file") from None
        except (pa.ArrowException, OSError) as error:
            reason = one_line(error)[:120]
            raise InputError(f"{path}: cannot be read as parquet, it may be cut short ({reason})") from None
        if self._table.num_rows == 0:
            raise InputError(f"{path}: holds no rows; remove the file")
        self.class_names = self._names(schema)

    def paths(self) -> list[str]:
        """The file name of every image."""
        column = self._table.column(self._image_column)
        if not (pa.types.is_struct(column.type) and column.type.get_field_index("path") >= 0):
            raise InputError(f"{self.path}: column {self._image_column!r}: its images have no 'path'")
        return [str(row["path"]) for row in column.to_pylist()]

    def labels(self) -> Tensor:
        """Int64[rows]."""
        column = self._table.column(self._label_column)
        if pa.types.is_dictionary(column.type) or not (
            pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
        ):
            raise InputError(
                f"{self.path}: column {self._label_column!r}: labels must be whole numbers, found "
                f"{column.type}"
            )
        if column.null_count:
            row = int(np.argmax(column.is_null().to_numpy()))
            raise InputError(
                f"{self.path}: row {row}: has no label; give it a class number or remove the row"
            )
        return as_labels(f"{self.path}: {self._label_column}", column.to_numpy())

    def images(self) -> list[tuple[str, bytes | Path]]:
        """What to call each image in messages, and its encoded bytes."""
        column = self._table.column(self._image_column)
        if pa.types.is_struct(column.type):
            fields = [column.type.field(index).name for index in range(column.type.num_fields)]
            if "bytes" not in fields:
                raise InputError(
                    f"{self.path}: column {self._image_column!r}: its struct has no field 'bytes'"
                )
            column = pa.chunked_array([chunk.field("bytes") for chunk in column.chunks])
        # A column without any value has the type null; its first row is reported below.
        if not any(
            test(column.type) for test in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_null)
        ):
            raise InputError(
                f"{self.path}: column {self._image_column!r}: must hold image files as binary or "
                f"struct<bytes, path>, found {column.type}"
            )
        encoded: list[tuple[str, bytes | Path]] = []
        for row, content in enumerate(column.to_pylist()):
            if content is None:
                raise InputError(
                    f"{self.path}: row {row}: has no image bytes; store the bytes of the file, not its path "
                    "alone"
                )
            encoded.append((f"{self.path}: row {row}", content))
        return encoded

    def _column(self, schema: Any, candidates: Sequence[str]) -> str:
        for name in candidates:
            if schema.names.count(name) > 1:
                raise InputError(f"{self.path}: has several columns {name!r}; remove all but one")
            if name in schema.names:
                return name
        wanted = " or ".join(map(repr, candidates))
        raise InputError(f"{self.path}: no column {wanted}, only {', '.join(map(repr, schema.names[:8]))}")

    def _names(self, schema: Any) -> tuple[str, ...] | None:
        """The class names in the metadata of Hugging Face, if there are any."""
        try:
            features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
            names = features[self._label_column]["names"]
        except (KeyError, TypeError, ValueError):
            return None
        return tuple(map(str, names)) if isinstance(names, list) and names else None


def _files(path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> tuple[list[Path], str]:
    """The files meant, in order, and what to call them together."""
    if not isinstance(path, str | os.PathLike):
        files = [Path(one) for one in path]
        if not files:
            raise InputError("read_parquet: no files given")
        return files, str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    one = Path(path)
    if one.is_dir():
        files = parquet_files(one)
        if not files:
            raise InputError(f"{one}: holds no .parquet files")
        return files, str(one)
    if not one.exists() and glob.has_magic(str(path)):
        found = (Path(match) for match in glob.glob(str(path), recursive=True))
        files = natural_order(match for match in found if match.is_file())
        if not files:
            raise InputError(f"{one}: no file matches this pattern")
        return files, str(one)
    return [one], str(one)


def parquet_files(folder: Path) -> list[Path]:
    """The parquet files in a folder, or in its folder `data`, in the order of the numbers in their names."""
    for place in (folder, folder / "data"):
        files = [file for file in place.glob("*.parquet") if file.is_file() and not file.name.startswith(".")]
        if files:
            return natural_order(files)
    return []
