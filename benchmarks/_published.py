"""Published figures beside measured ones: docs/results/published.md.

The published ones stand in benchmarks/published.toml with where they were read, what was measured is read
from the stored results, and the last word of a row follows from the two by the rule that the page states.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from benchmarks._tables import NOT_MEASURED, Record, percent, table, text
from benchmarks._values import line_of, marked, told

NEAR: Final = 0.1
FACTS: Final = tomllib.loads(Path(__file__).with_name("published.toml").read_text(encoding="utf-8"))
SETS: Final = {"next": "sample, 5,000", "table-sample": "sample, 2,000", "table-cifar10": "CIFAR-10, 2,500"}
UNKNOWN: Final = "nothing to compare with"
DETECTORS: Final = (
    *("detector", "attack", "published: poison flagged", "clean flagged", "of", "measured on"),
    *("poison flagged", "clean flagged", "average precision", "of that order", "why not"),
)
ATTACKS: Final = (
    *("attack", "of the set", "published success", "of", "measured", "never poisoned"),
    *("of that order", "why not, and what was tried"),
)


def page(results: Mapping[str, Record]) -> Iterator[str]:
    """The parts of the page."""
    yield "# Published figures beside measured ones"
    yield FACTS["about"].strip()
    yield "## Detectors, each on the attack that it was made for"
    yield table(DETECTORS, [cells for row in FACTS["detectors"] for cells in _detector(row, results)])
    yield "## Attacks"
    yield table(ATTACKS, [_attack(row, results) for row in FACTS["attacks"]])


def order_of(published: tuple[float | None, float | None], measured: tuple[float, float]) -> str:
    """Whether shares of the poison and of the clean are those published, give or take ten points."""
    missed = [
        word
        for word, wanted, rate, sign in zip(("poison", "clean"), published, measured, (1, -1), strict=True)
        if wanted is not None and sign * (wanted - rate) > NEAR
    ]
    return UNKNOWN if published[0] is None else f"no: {' and '.join(missed)}" if missed else "yes"


def _detector(row: Record, results: Mapping[str, Record]) -> Iterator[list[str]]:
    """A row for each result; what they share stands in the first, the reason in the first that needs it."""
    published, untold = (row.get("true"), row.get("false")), True
    known = [
        row["name"],
        row["attack"],
        *("" if one is None else percent(one) for one in published),
        row["of"],
    ]
    for number, recipe in enumerate(row["recipes"]):
        where = next(words for name, words in SETS.items() if recipe.startswith(name))
        cells = [NOT_MEASURED, "", "", "", ""]
        if recipe in results:
            line = line_of(results[recipe], detector=row["name"], attack=row["attack"], control="")
            true, false = (one["rate"] for one in marked(line))
            order, precision = order_of(published, (true, false)), line["average_precision"]["mean"]
            why = row.get("why", "") if order.startswith("no:") and untold else ""
            untold = untold and not why
            cells = [percent(true), percent(false), "" if precision is None else text(precision), order, why]
        yield [*(known if not number else [""] * len(known)), where, *cells]


def _attack(row: Record, results: Mapping[str, Record]) -> list[str]:
    published, cells = row.get("success"), [NOT_MEASURED, "", ""]
    if row["recipe"] in results:
        poisoned, clean = (
            line_of(results[row["recipe"]], attack=row["name"], budget=row["budget"], control=control)
            for control in ("no defense", "no attack")
        )
        measured, order = poisoned["success_rate"]["mean"], UNKNOWN
        if published is not None:
            order = order_of((published, None), (measured, 0.0))
            order = "yes" if order == "yes" else "in part" if measured >= published / 2 else "no"
        cells = [told(poisoned["success_rate"]), told(clean["success_rate"]), order]
    rate = "" if published is None else percent(published)
    return [row["name"], f"{text(100 * row['budget'])} %", rate, row["of"], *cells, row.get("why", "")]
