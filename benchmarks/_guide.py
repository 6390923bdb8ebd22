"""The table of docs/which_method.md: for each situation a method, what was measured of it, and what was not.

The rows stand in benchmarks/guide.toml, what was measured is read from the stored results, and what a method
costs from its registry.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from benchmarks._recipe_tables import defended, line_of, marked, share, told
from benchmarks._study_tables import hits
from benchmarks._tables import NOT_MEASURED, Record, proportion, table
from unpoison import attacks, defenses, detectors, input_detectors, unlearners

Results = Mapping[str, Record]
PAGE: Final = "docs/which_method.md"
BEGIN, END = "<!-- situations -->", "<!-- /situations -->"


def rate(record: Record, name: str) -> str:
    """A rate by its name; "" where it had no trial."""
    return share(record["rates"], name)


def mean(line: Record) -> str:
    """Success with the number of trials."""
    rate = line["success_rate"]
    return told(rate) + (f" (mean of {rate['n']})" if "n" in rate else "")


def found(record: Record, line: Record) -> str:
    """How many attacks a detector found."""
    return proportion(line_of(record, control="", **line)["found"], interval=False)


def flagged(record: Record, line: Record) -> str:
    """Poison that a detector flagged, how many it flagged, and success after retraining without them."""
    chosen = line_of(record, control="", **line)
    return (
        f"{share(chosen, 'true_positives')} of the poison among {chosen['precision']['trials']:,} flagged, "
        f"success {mean(chosen)} after retraining without them"
    )


def seen(record: Record, line: Record) -> str:
    """What a detector flagged of the poison and of the clean."""
    true, false = (proportion(one, interval=False) for one in marked(line_of(record, control="", **line)))
    return f"{true}, {false} of the clean"


def success(record: Record, line: Record) -> str:
    """Mean success of an undefended attack, and the trials in which most inputs get the wanted answer."""
    chosen = line_of(record, control="no defense", **line)
    hit = chosen["success"]
    return f"success {mean(chosen)}; {hit['successes']} of {hit['trials']} on most inputs"


def under(record: Record, line: Record) -> str:
    """Mean success of an attack under a defense, and the accuracy."""
    chosen = line_of(record, control="", **line)
    return f"success {mean(chosen)}, accuracy {told(chosen['clean_accuracy'])}"


def healed(record: Record, name: str) -> str:
    """Success and accuracy after an unlearner, and its time beside retraining."""
    after, kept = (
        proportion(record["rates"][f"{name}: {what}"], interval=False)
        for what in ("attack success", "clean accuracy")
    )
    retrain = f"{name.partition(',')[0]}, retrain"
    times = record["seconds"][name] / record["seconds"][retrain]
    beside = "" if name == retrain else f", {times:.2f} of the time of retraining"
    return f"success {after}, accuracy {kept}{beside}"


VALUES: Final[Mapping[str, Callable[[Record, Any], str]]] = {
    "rate": rate,
    "found": found,
    "flagged": flagged,
    "seen": seen,
    "success": success,
    "under": under,
    "healed": healed,
    "defended": lambda record, names: defended(*names)(record),
    "hits": lambda record, budget: hits(budget)(record),
}


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
