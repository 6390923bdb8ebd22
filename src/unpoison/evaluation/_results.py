"""`Results`: the rows of a recipe, read from a store. This module does not import torch.

A trial's row is a parquet file of its own. When a sweep ends, its rows are also put into one file
(`tables/NAME.parquet`), so that 10,000 of them are read in a second; that file is only a copy, and rows that
it lacks are read from their own files. DuckDB reads both: `SELECT * FROM 'STORE/artefacts/*/*/row.parquet'`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import pyarrow as pa
import pyarrow.parquet as pq

from unpoison._artefacts import atomic_file, canonical_json, digest, read_json
from unpoison.errors import InputError
from unpoison.evaluation._store import Store

_MANY = pa.list_(pa.int64())
ROW = pa.schema(
    [
        ("attack", pa.string()),
        ("budget", pa.float64()),  # as the recipe has it: a share, or a count above 1
        ("source", pa.string()),
        ("target", pa.string()),
        ("test_indices", _MANY),  # of the target images
        ("seed", pa.int64()),
        ("victim", pa.string()),  # the kind
        ("number", pa.int64()),  # of the victim among those of its kind, poison and seed
        ("defense", pa.string()),
        ("detector", pa.string()),
        ("observation", pa.int64()),  # the number of the observation that was traced
        ("unlearner", pa.string()),
        ("control", pa.string()),  # empty, or which control the trial is
        ("poisons", pa.int64()),
        ("poison_share", pa.float64()),
        ("clean_correct", pa.int64()),
        ("clean_total", pa.int64()),
        ("attack_successes", pa.int64()),
        ("attack_total", pa.int64()),
        ("attack_correct", pa.int64()),  # how many of the adversary's inputs are given their own class
        ("margin", pa.float64()),  # mean over the adversary's inputs; negative where the attack succeeds
        ("class_names", pa.list_(pa.string())),
        ("class_correct", _MANY),
        ("class_total", _MANY),
        ("observed", pa.bool_()),  # whether there was an answer to trace
        ("found", pa.bool_()),  # the verdict: whether there is poison
        ("p_value", pa.float64()),
        ("cause", pa.string()),  # the kind of cause that the examples speak for
        ("flagged", pa.int64()),
        ("true_positives", pa.int64()),
        ("false_positives", pa.int64()),
        ("clean_examples", pa.int64()),
        ("average_precision", pa.float64()),
        ("rounds", pa.int64()),  # how often a repair healed
        ("outcome", pa.string()),  # of a repair
        ("removed", pa.int64()),  # examples that a repair removed, all rounds together
        ("removed_poisons", pa.int64()),
        ("noise_score", pa.float64()),  # the Gaussian Unlearning Score, where the poison is such noise
        ("noise_remembered", pa.int64()),  # noisy images that the model still correlates with
        ("noise_total", pa.int64()),
        ("certified", _MANY),  # test images predicted rightly and certified against 0, 1, 2, ... changes
        ("class_false_positives", _MANY),
        ("class_clean", _MANY),
        ("seconds_craft", pa.float64()),
        ("seconds_train", pa.float64()),
        ("seconds_calibrate", pa.float64()),
        ("seconds_find", pa.float64()),
        ("seconds_heal", pa.float64()),
        ("peak_bytes", pa.float64()),
        ("dropped", pa.int64()),  # training examples that a defense no longer used in the last epoch
        ("dropped_poisons", pa.int64()),
        ("examples", pa.int64()),  # of the training set, where there was a defense
        ("screened_clean", pa.int64()),  # clean test images that a test-time detector screened
        ("screened_triggered", pa.int64()),  # those with the trigger that are answered as wanted
        ("screened_false_01", pa.int64()),  # clean ones flagged at a false-positive rate of .01
        ("screened_false_05", pa.int64()),
        ("screened_true_01", pa.int64()),  # triggered ones flagged at that rate
        ("screened_true_05", pa.int64()),
        ("screened_auroc", pa.float64()),
        ("seconds_screen", pa.float64()),
    ]
)
"""The columns of a row."""
COSTS = (
    "seconds_craft",
    "seconds_train",
    "seconds_calibrate",
    "seconds_find",
    "seconds_screen",
    "seconds_heal",
    "peak_bytes",
)
"""The columns that differ from machine to machine; all others are the same wherever the recipe is run."""
_KEYED = ROW.append(pa.field("key", pa.string()))


@final
@dataclass(frozen=True)
class Results:
    """The results of a recipe.

    Arguments:
        name: of the recipe.
        table: one row for each finished trial, in the recipe's order: the columns of `ROW`, and `key`.
        planned: how many trials the recipe has.
        failures: the errors, a line each.
        store: where the rows lie.
        experiment: the recipe, as JSON values.
    """

    name: str
    table: pa.Table
    planned: int
    failures: tuple[str, ...]
    store: Path
    experiment: dict[str, Any]

    @property
    def deterministic(self) -> pa.Table:
        """The table without its costs: the same to the last digit, however the recipe was run."""
        return self.table.drop_columns(list(COSTS))

    @property
    def costs(self) -> pa.Table:
        """Seconds of each stage and peak memory, with the trials' keys."""
        return self.table.select(["key", *COSTS])

    @property
    def fingerprint(self) -> str:
        """A digest of the deterministic table."""
        return digest(canonical_json(self.deterministic.to_pylist()))

    @classmethod
    def read(cls, store: str | os.PathLike[str], name: str | None = None) -> Results:
        """Read a recipe's rows; those that do not exist yet are left out.

        Arguments:
            store: the directory.
            name: of the recipe; may be left out where the store has only one.

        Raises:
            InputError: the store has no such recipe, or several and none is named.
        """
        root = Path(store)
        names = recipes_in(root)
        listed = ", ".join(names) or "none"
        if name is None and len(names) != 1:
            raise InputError(f"{root}: name one of its recipes: {listed}")
        name = names[0] if name is None else name
        if name not in names:
            raise InputError(f"{root}: has no recipe {name!r}; there are {listed}")
        manifest = read_json(root / "recipes" / f"{name}.json")
        found = Store(root)
        return cls(
            name=name,
            table=_rows(found, name, manifest["rows"]),
            planned=len(manifest["rows"]),
            failures=found.errors(manifest["stages"]),
            store=root,
            experiment=manifest["experiment"],
        )

    def pack(self) -> None:
        """Put the rows into one file, for quick reading."""
        with atomic_file(_packed(self.store, self.name)) as staging:
            pq.write_table(self.table, staging, write_page_checksum=True)


def recipes_in(store: str | os.PathLike[str]) -> tuple[str, ...]:
    """The names of the recipes that a store has results of; none for a directory that is no store."""
    return tuple(sorted(path.stem for path in Path(store, "recipes").glob("*.json")))


def _packed(root: Path, name: str) -> Path:
    return root / "tables" / f"{name}.parquet"


def _rows(store: Store, name: str, keys: Sequence[str]) -> pa.Table:
    """The rows with these keys, in this order."""
    packed = _read_packed(_packed(store.root, name))
    there = set(packed["key"].to_pylist())
    others = [key for key in keys if key not in there and (store.place(key) / "row.parquet").is_file()]
    single = pa.Table.from_pylist([_read_row(store, key) for key in others], schema=_KEYED)
    table = pa.concat_tables([single, packed])
    places = {key: place for place, key in enumerate(table["key"].to_pylist())}
    chosen = pa.array([places[key] for key in keys if key in places], pa.int64())
    return table.take(chosen).combine_chunks()


def _read_packed(path: Path) -> pa.Table:
    """The rows in one file; none where it is not there, or damaged: it is only a copy."""
    with contextlib.suppress(OSError, pa.ArrowException):
        table = pq.read_table(path, page_checksum_verification=True, memory_map=False)
        if table.schema.equals(_KEYED):
            return table
    return _KEYED.empty_table()


def _read_row(store: Store, key: str) -> dict[str, Any]:
    path = store.place(key) / "row.parquet"
    try:
        table = pq.ParquetFile(path).read()
        if not table.schema.equals(ROW):
            raise InputError(f"{path}: its columns are those of another version; run the recipe again")
        [row] = table.to_pylist()
    except InputError:
        raise
    except (OSError, pa.ArrowException, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: damaged ({reason}); run the recipe again to make it anew") from None
    return {**row, "key": key}
