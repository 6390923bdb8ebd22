"""The table of docs/which_method.md: for each situation a method, what was measured of it, and what was not.

The rows stand in benchmarks/guide.toml, what was measured is read from the stored results, and what a method
costs from its registry.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from benchmarks._tables import NOT_MEASURED, Record, table
from benchmarks._values import VALUES
from unpoison import attacks, defenses, detectors, input_detectors, unlearners

Results = Mapping[str, Record]
PAGE: Final = "docs/which_method.md"
BEGIN, END = "<!-- situations -->", "<!-- /situations -->"


@final
@dataclass(frozen=True)
class Situation:
    """A row: the situation, what to take, the parts of what was measured, its cost, and what is not known."""

    what: str
    take: str
    measured: tuple[tuple[str, str, str, Any], ...]
    cost: str
    unknown: str

    def cells(self, results: Results) -> list[str]:
        """The cells of the row."""
        parts = [
            f"{words} {value}"
            for result, words, kind, of in self.measured
            if result in results and (value := VALUES[kind](results[result], of))
        ]
        registries = (attacks, defenses, detectors, input_detectors, unlearners)
        cost = next(
            (one.describe(self.cost).cost for one in registries if self.cost in one.names()), self.cost
        )
        return [self.what, self.take, "; ".join(parts) or NOT_MEASURED, cost, self.unknown]


FACTS: Final = Path(__file__).with_name("guide.toml")
SITUATIONS: Final = tuple(
    Situation(**row) for row in tomllib.loads(FACTS.read_text(encoding="utf-8"))["situations"]
)


def situations(results: Results) -> str:
    """The table."""
    header = ("situation", "take", "measured", "cost", "not measured")
    return table(header, [one.cells(results) for one in SITUATIONS])
