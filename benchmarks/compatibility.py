"""What people bring: kinds of dataset and of network.

    make compat
    python -m benchmarks.compatibility [--only WORDS] [--store NAME] [--json]

Each kind in tests/compatibility is built at a tiny size, and each verb is tried with it. A verb works if its
result agrees with that of the plain form (the same inputs in memory, the same network with tensor logits); it
refuses if it raises one of unpoison's own errors with a message of one line; anything else fails. ✗ marks the
outcomes that are not wanted of a kind; "as wanted" counts the others. Kinds that need a package which is not
installed (the extra `compat`) are left out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from benchmarks._harness import Bench, main, say, tally
from benchmarks._tables import Record, table

FOLDER: Final = Path(__file__).resolve().parents[1] / "tests" / "compatibility"
SIDES: Final = ("dataset", "network")
MARKS: Final = {"works": "✓", "refused": "refused", "fails": "**fails**"}


def measure(bench: Bench) -> None:
    """Try every verb with every kind."""
    sys.path.insert(0, str(FOLDER))
    import compat_harness as harness
    from compat_datasets import DATASETS
    from compat_networks import NETWORKS

    bench.trials = []  # nothing is taken over from an earlier run
    for side, kinds, verbs in zip(
        SIDES, (DATASETS, NETWORKS), (harness.DATASET_VERBS, harness.NETWORK_VERBS), strict=True
    ):
        for kind in kinds:
            if bench.options.only not in " needs ".join((kind.name, *kind.needs)) or kind.absent():
                continue
            row: dict[str, Any] = {"side": side, "kind": kind.name, "verbs": {}}
            for verb in verbs:
                outcome, expected = harness.run(kind, verb), kind.expected.get(verb, harness.WORKS)
                told = {"words": outcome.words, "where": outcome.where}
                row["verbs"][verb] = {"outcome": outcome.outcome, "as wanted": outcome.meets(expected)}
                row["verbs"][verb] |= {name: value for name, value in told.items() if value}
            row["as wanted"] = all(one["as wanted"] for one in row["verbs"].values())
            bench.trials.append(row)
            outcomes = (f"{verb} {one['outcome']}" for verb, one in row["verbs"].items())
            say(f"{kind.name}: {', '.join(outcomes)}")
        rows = [row for row in bench.trials if row["side"] == side]
        bench.rates[f"kinds of {side} as wanted"] = tally(row["as wanted"] for row in rows)
        every = [one for row in rows for one in row["verbs"].values()]
        bench.rates[f"verbs on kinds of {side} as wanted"] = tally(one["as wanted"] for one in every)
    bench.work = {"verbs": dict(harness.VERBS), "packages": harness.packages()}


def tables(record: Record) -> Iterator[str]:
    """What each verb is, a table of datasets and one of networks, the words of what is not as wanted."""
    yield table(("verb", "what was tried"), [list(one) for one in record["work"]["verbs"].items()])
    yield ", ".join(" ".join(one) for one in record["work"].get("packages", {}).items())
    for side in SIDES:
        rows = [row for row in record["trials"] if row["side"] == side]
        if not rows:
            continue
        verbs = list(rows[0]["verbs"])
        cells = [[row["kind"], *(_mark(row["verbs"][verb]) for verb in verbs)] for row in rows]
        yield f"### Kinds of {side}"
        yield table((f"kind of {side}", *verbs), cells)
        unwanted = table(
            ("kind", "verbs", "outcome", "words"), [one for row in rows for one in _unwanted(row)]
        )
        yield f"Not as wanted:\n\n{unwanted}" if unwanted else ""


def _mark(one: Record) -> str:
    return ("" if one["as wanted"] else "✗ ") + MARKS[one["outcome"]]


def _unwanted(row: Record) -> list[list[str]]:
    found: dict[tuple[str, str], list[str]] = {}
    for verb, one in row["verbs"].items():
        if not one["as wanted"]:
            words = one.get("words", "") + (f" ({one['where']})" if one.get("where") else "")
            found.setdefault((one["outcome"], words), []).append(verb)
    return [[row["kind"], ", ".join(verbs), outcome, words] for (outcome, words), verbs in found.items()]


if __name__ == "__main__":
    main(measure, threads=1, only="", store="")
