"""Lists of images on disk: tables of paths and labels, tar shards, and datasets of Hugging Face on disk."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unpoison._artefacts import read_bytes
from unpoison.data._classes import class_names_or_numbers
from unpoison.data._datasets import from_dataset
from unpoison.data._image_files import Files, ImageFiles
from unpoison.data._images import SUFFIXES, Part, Preparation, natural_order
from unpoison.data._source import as_numbers
from unpoison.data._splits import Splits
from unpoison.data._training_set import TrainingSet
from unpoison.errors import InputError, MissingExtraError, one_line

_PATHS = ("path", "file", "file_name", "filename", "image")
_LABELS = ("label", "labels", "class", "target")


def read_manifest(
    path: str | os.PathLike[str], *, size: int | None = None, orient: bool = False
) -> Splits[TrainingSet]:
    """Read a table of paths and labels: a CSV file, or a parquet file with a column of paths.

    Columns are called `path` (or `file`, `file_name`, `filename`, `image`) and `label` (or `labels`, `class`,
    `target`). Paths are relative to the folder of the table, and are the ids of the examples. Labels are
    numbers from 0, or names, which are sorted.

    Arguments:
        path: the table.
        size: as for `read_folder`.
        orient: as for `read_folder`.

    Raises:
        InputError: a column or a file is missing, a label is no class, or as `read_folder`.
    """
    return list_manifest(Path(path), Preparation(size, orient)).held()


def list_manifest(table: Path, preparation: Preparation) -> Files:
    """The image files of a table, of which none is read; see `read_manifest`."""
    columns = _csv_columns(table) if table.suffix.lower() in (".csv", ".tsv") else _parquet_columns(table)
    paths = [str(one) for one in _column(table, columns, _PATHS)]
    given: Sequence[Any] = _column(table, columns, _LABELS)
    if not paths:
        raise InputError(f"{table}: holds no rows")
    if all(isinstance(label, str) and re.fullmatch("-?[0-9]+", label) for label in given):
        given = [int(label) for label in given]
    labels, names = as_numbers(str(table), given, None)
    class_names = class_names_or_numbers(str(table), names, {str(table): labels})
    files = [table.parent / one for one in paths]
    train = ImageFiles(str(table), table.parent, files, paths, labels, class_names, preparation)
    return Files(train, notes=_notes(preparation))


def is_manifest(file: Path) -> bool:
    """Whether a parquet file holds paths of images rather than images."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(file)
    except (pa.ArrowException, OSError):
        return False
    return "image" not in schema.names and any(
        schema.names.count(name) == 1 and pa.types.is_string(schema.field(name).type) for name in _PATHS
    )


def read_shards(
    path: str | os.PathLike[str], *, size: int | None = None, orient: bool = False
) -> Splits[TrainingSet]:
    """Read tar files in the layout of WebDataset: `KEY.png` (or another image) beside `KEY.cls`.

    `KEY.json` with a `label` serves as well. Shards are read in the order of the numbers in their names; the
    ids of the examples are their keys.

    Arguments:
        path: one tar file, or a folder of them.
        size: as for `read_folder`.
        orient: as for `read_folder`.

    Raises:
        InputError: a file cannot be read, an image or label is missing, or as `read_folder`.
    """
    return list_shards(Path(path), Preparation(size, orient)).held()


def list_shards(given: Path, preparation: Preparation) -> Files:
    """The image files in tar shards, of which none is read; see `read_shards`."""
    shards = natural_order(given.glob("*.tar")) if given.is_dir() else [given]
    encoded: list[Part] = []
    places: list[str] = []
    labels: list[int] = []
    ids: list[str] = []
    for shard in shards:
        for key, parts in _samples(shard).items():
            where = f"{shard}: {key}"
            image = next((parts[one] for one in parts if f".{one.lower()}" in SUFFIXES), None)
            if image is None:
                raise InputError(f"{where}: has no image; found {', '.join(map(repr, parts))}")
            encoded.append(image)
            places.append(where)
            labels.append(_label(where, parts))
            ids.append(key)
    if not encoded:
        raise InputError(f"{given}: holds no samples")
    numbers, _ = as_numbers(str(given), labels, None)
    class_names = class_names_or_numbers(str(given), None, {str(given): numbers})
    root = given if given.is_dir() else given.parent
    train = ImageFiles(str(given), root, encoded, ids, numbers, class_names, preparation, places=places)
    return Files(train, notes=_notes(preparation))


def read_saved_dataset(path: str | os.PathLike[str]) -> Splits[TrainingSet]:
    """Read the folder that `datasets.Dataset.save_to_disk` wrote.

    Raises:
        MissingExtraError: the package datasets is not installed.
        InputError: as `from_dataset`.
    """
    try:
        import datasets
    except ImportError:
        raise MissingExtraError(
            f"{path}: was written by save_to_disk of the package datasets, which is not installed; "
            "pip install datasets"
        ) from None
    found = datasets.load_from_disk(str(path))
    if not hasattr(found, "features") or isinstance(found, dict):
        raise InputError(f"{path}: holds several splits ({', '.join(map(str, found))}); give one of them")
    return Splits(from_dataset(found, name=str(path)))


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file()


def _csv_columns(table: Path) -> dict[str, list[str]]:
    try:
        text = read_bytes(table).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{table}: cannot be read as text ({error})") from None
    head = text.partition("\n")[0]
    separator = max(",;\t", key=head.count)
    rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True))
    names = list(rows[0]) if rows else head.strip().split(separator)
    for number, row in enumerate(rows, start=2):
        if None in row.values() or None in row:
            raise InputError(f"{table}: line {number}: has another number of columns than the first line")
    return {str(name): [row[name] for row in rows] for name in names}


def _parquet_columns(table: Path) -> dict[str, list[Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        read = pq.read_table(table)
    except FileNotFoundError:
        raise InputError(f"{table}: no such file") from None
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{table}: cannot be read as parquet ({one_line(error)[:120]})") from None
    return {name: read[name].to_pylist() for name in read.column_names}


def _column(table: Path, columns: dict[str, list[Any]], names: Sequence[str]) -> list[Any]:
    by_name = {name.lower(): column for name, column in columns.items()}
    for name in names:
        if name in by_name:
            return by_name[name]
    raise InputError(f"{table}: no column {names[0]!r}, only {', '.join(map(repr, list(columns)[:8]))}")


def _samples(shard: Path) -> dict[str, dict[str, Part]]:
    """The parts of each sample by their endings, in order."""
    samples: dict[str, dict[str, Part]] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                key, _, ending = name.partition(".")
                if member.isfile() and ending:
                    part = Part(shard, member.offset_data, member.size)
                    samples.setdefault(f"{folder}/{key}" if folder else key, {})[ending] = part
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f"{shard}: cannot be read as a tar file ({one_line(error)})") from None
    return samples


def _label(where: str, parts: dict[str, Part]) -> int:
    try:
        if "cls" in parts:
            return int(parts["cls"].read(where).decode("ascii"))
        return int(json.loads(parts["json"].read(where))["label"])
    except (KeyError, TypeError, ValueError, UnicodeDecodeError):
        raise InputError(f"{where}: has no whole number as .cls, or as 'label' in .json") from None


def _notes(preparation: Preparation) -> tuple[str, ...]:
    return (str(preparation),) if str(preparation) else ()
