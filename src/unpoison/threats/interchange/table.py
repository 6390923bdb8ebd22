"""Tables: a folder with `poisons.csv` and image files, or one `.parquet` file, for people and table tools."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, final

import torch
from torch import Tensor

from unpoison._artefacts import atomic_directory, atomic_file
from unpoison.data import TrainingSet, encode_png, read_image
from unpoison.errors import InputError, one_line
from unpoison.threats._goal import Goal
from unpoison.threats._make_goal import find_class
from unpoison.threats._poison_set import PoisonSet
from unpoison.threats.interchange.common import fitting, imported


def read_poison_table(
    path: str | os.PathLike[str],
    training_set: TrainingSet,
    goal: Goal,
    *,
    eps: float | None = None,
    attack: str = "imported",
) -> PoisonSet:
    """Read poisons from a folder with `poisons.csv` and image files, or from a `.parquet` file.

    Columns: `index`, the place in the training set; `given_label` (or `label`), a number or the name of a
    class; in a folder `file`, relative to it, and in parquet `image`, the bytes of an image file or
    struct<bytes, path>. Other columns are ignored.

    Arguments:
        path: the folder or the file.
        training_set: the clean set that the indices refer to.
        goal: what the adversary wants, which tables do not contain.
        eps: the greatest change that was allowed, in 1/255; more than half a step above it is an error.
        attack: what to call the attack.

    Raises:
        InputError: a file or column is missing, an image does not decode or fit, an index or label is
            invalid, a file lies outside the folder, or a change is more than `eps`.
    """
    place = Path(path)
    rows = _csv_rows(place) if place.is_dir() else _parquet_rows(place)
    if not rows:
        raise InputError(f"{place}: holds no poisons")
    return imported(
        str(place),
        training_set,
        indices=[row.index for row in rows],
        images=torch.stack([row.pixels(training_set) for row in rows]),
        labels=[
            find_class(row.label, training_set.class_names, option=f"{row.where}: label") for row in rows
        ],
        goal=goal,
        attack=attack,
        format="table",
        eps=eps,
    )


def write_poison_table(path: str | os.PathLike[str], poison: PoisonSet) -> None:
    """Write poisons as a `.parquet` file if `path` ends so, else as a folder of `poisons.csv` and PNG files.

    Columns: index, file (or image), clean_label, given_label, linf, l2. The goal is not written.

    Raises:
        InputError: images have neither 1 nor 3 channels, or the file cannot be written.
    """
    encoded = [encode_png(image) for image in poison.images]
    names = [f"images/{index}.png" for index in poison.indices.tolist()]
    columns = {
        "index": poison.indices.tolist(),
        "clean_label": poison.clean_labels.tolist(),
        "given_label": poison.given_labels.tolist(),
        "linf": poison.linf.tolist(),
        "l2": poison.l2.tolist(),
    }
    if Path(path).suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        image_type = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        pictures = [
            {"bytes": content, "path": Path(name).name} for content, name in zip(encoded, names, strict=True)
        ]
        table = pyarrow.table({"image": pyarrow.array(pictures, image_type), **columns})
        with atomic_file(path) as staging:
            pyarrow.parquet.write_table(table, staging)
        return
    with atomic_directory(path) as staging:
        (staging / "images").mkdir()
        for name, content in zip(names, encoded, strict=True):
            (staging / name).write_bytes(content)
        with (staging / "poisons.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["index", "file", *list(columns)[1:]])
            for row, name in enumerate(names):
                values = [column[row] for column in columns.values()]
                writer.writerow([values[0], name, *values[1:]])


@final
@dataclass(frozen=True)
class _Row:
    """One poison of a table; its content is the bytes of an image file, or the path."""

    where: str
    index: int
    label: Any
    content: bytes | Path

    def pixels(self, training_set: TrainingSet) -> Tensor:
        """UInt8[c h w], with the channels of the training set."""
        return fitting(self.where, read_image(self.content, where=self.where), training_set)


def _csv_rows(folder: Path) -> list[_Row]:
    table = folder / "poisons.csv"
    try:
        with table.open(newline="", encoding="utf-8") as file:
            entries = list(csv.DictReader(file))
    except FileNotFoundError:
        raise InputError(f"{table}: no such file") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table}: cannot be read ({error})") from None
    rows = []
    for number, entry in enumerate(entries, start=2):
        where = f"{table}: line {number}"
        label = _column(where, entry, "given_label", "label")
        name = PurePosixPath(_column(where, entry, "file"))
        if name.is_absolute() or ".." in name.parts or "\\" in str(name) or ":" in str(name):
            raise InputError(f"{where}: file {str(name)!r} must lie inside the folder")
        rows.append(_Row(where, _index(where, _column(where, entry, "index")), label, folder / name))
    return rows


def _parquet_rows(file: Path) -> list[_Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        entries = pyarrow.parquet.read_table(file).to_pylist()
    except FileNotFoundError:
        raise InputError(f"{file}: no such file or folder") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{file}: cannot be read as parquet ({one_line(error)[:120]})") from None
    rows = []
    for number, entry in enumerate(entries):
        where = f"{file}: row {number}"
        label = _column(where, entry, "given_label", "label")
        image = _column(where, entry, "image")
        content = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(content, bytes):
            raise InputError(f"{where}: has no image bytes")
        rows.append(_Row(where, _index(where, _column(where, entry, "index")), label, content))
    return rows


def _column(where: str, entry: Mapping[str, Any], *names: str) -> Any:
    for name in names:
        if entry.get(name) is not None:
            return entry[name]
    raise InputError(f"{where}: has no {' or '.join(map(repr, names))}")


def _index(where: str, value: Any) -> int:
    text = str(value)
    if not (text.isascii() and text.isdigit()):
        raise InputError(f"{where}: index {text[:30]!r} is not a whole number >= 0")
    return int(text)
