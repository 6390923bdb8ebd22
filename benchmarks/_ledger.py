"""The ledger: what had been looked at, tried and confirmed before each number was published.

The facts stand in benchmarks/ledger.toml, by the name of the stored result; the numbers are those of the
README's rows. An entry whose name ends in * is of all results that begin so and have none of their own.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

from benchmarks._tables import NOT_MEASURED, Record, Section, table

FACTS: Final = Path(__file__).parent / "ledger.toml"
COLUMNS: Final = ("chosen", "confirmed", "version")
UNKNOWN: Final = "not recorded"
ABOUT: Final = (
    "For each number of the README's table: on what the method and its settings were chosen, on what the "
    "number was measured, and whether it is of the present version. A number that was confirmed on nothing "
    "new describes the development scenes and is no estimate for others. Ratios of speed are left out: "
    "nothing is chosen by them but the batch sizes that their commands name."
)


def read(path: Path = FACTS) -> Mapping[str, Mapping[str, str]]:
    """The facts by the name of the result.

    Raises:
        SystemExit: an entry has other keys.
    """
    facts = tomllib.loads(path.read_text(encoding="utf-8"))
    for name, entry in facts.items():
        if set(entry) != set(COLUMNS):
            raise SystemExit(f"{path}: {name}: needs {', '.join(COLUMNS)}, found {', '.join(entry)}")
    return facts


def ledger(
    sections: Iterable[Section], results: Mapping[str, Record], facts: Mapping[str, Mapping[str, str]]
) -> str:
    """The page: a row for each number, with the facts where they change."""
    rows, last = [], None
    for section in sections:
        record = results.get(section.name)
        if record is None or record.get("rates") == {}:
            continue
        name = max((name for name in facts if fnmatch(section.name, name)), key=len, default="")
        entry = facts.get(name, dict.fromkeys(COLUMNS, UNKNOWN))
        numbers = [[row.what, row.value(record) or NOT_MEASURED] for row in section.rows]
        for number in numbers or [[section.title, "see its page"]]:
            rows.append([*number, *(entry[column] if name != last else "" for column in COLUMNS)])
            last = name
    header = ("number", "measured", "chosen on", "confirmed on", "version")
    return "\n\n".join(("# Held-out ledger", ABOUT, table(header, rows)))
