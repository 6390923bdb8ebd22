"""The ledger: what had been looked at, tried and confirmed before each number was published.

The facts stand in benchmarks/ledger.toml, by the name of the stored result; the numbers are those of the
README's rows.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
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
    rows = []
    for section in sections:
        record = results.get(section.name)
        if record is None or record.get("ratios"):
            continue
        entry = facts.get(section.name, dict.fromkeys(COLUMNS, UNKNOWN))
        told = [entry[column] for column in COLUMNS]
        numbers = [[row.what, row.value(record) or NOT_MEASURED] for row in section.rows]
        for place, number in enumerate(numbers or [[section.title, "see its page"]]):
            rows.append([*number, *(told if place == 0 else [""] * len(told))])
    header = ("number", "measured", "chosen on", "confirmed on", "version")
    return "\n\n".join(("# Held-out ledger", ABOUT, table(header, rows)))
