"""Which unlearners heal as well as retraining, and in what part of its time?

    python -m benchmarks.unlearning --json [--seeds 0 1] [--conditions exact half mixed] [--anew [METHOD ...]]

On the bundled sample, with BadNets (75 of 5,000 images with a white corner) and the preset `sample`. A seed
is one victim; source and target classes change with it. What is given as the examples to forget:

- exact: the poison;
- half: every second poison, as if the rest had not been found;
- mixed: the poison and as many innocent examples of the target class.

Every unlearner is measured with its defaults and in the form it was compared in; where a method's own
learning rate does nothing here, also with one chosen on kept examples. Seconds are of the process, with one
thread, so that other work on the machine does not count; the ratio is to retraining on the same victim.

Trials that are in benchmarks/results/unlearning.json are not done again, unless `--anew`; so a long run may
be stopped and goes on, and may be done in pieces.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.influence import machine, say
from unpoison import attacks, data, unlearners
from unpoison.data import TrainingSet
from unpoison.errors import UnpoisonError
from unpoison.evaluation import measure
from unpoison.threats import Backdoor, Budget, PatchTrigger, PoisonSet
from unpoison.training import Recipe, train
from unpoison.unlearners import (
    SCRUB,
    SSD,
    BadTeaching,
    BestOf,
    FineTune,
    Potion,
    Recant,
    Retrain,
    Unlearner,
)

RESULTS = Path(__file__).parent / "results" / "unlearning.json"
PAIRS = (("Sneaker", "Pullover"), ("Bag", "Sandal"), ("Trouser", "Shirt"))
METHODS: dict[str, Unlearner] = {
    "retrain": Retrain(),
    "fine-tune": FineTune(),
    "fine-tune, as compared": unlearners.get("fine-tune", preset="published"),
    "recant (ours)": Recant(),
    "potion": Potion(),
    "potion, as published": unlearners.get("potion", preset="published"),
    "ssd": SSD(),
    "ssd, chosen on kept examples": SSD(selection=None),
    "ssd, as compared": unlearners.get("ssd", preset="published"),
    "scrub": SCRUB(),
    "scrub, small scale": unlearners.get("scrub", preset="small-scale"),
    "scrub, learning rate chosen": BestOf(
        candidates=tuple(SCRUB(learning_rate=rate) for rate in (5e-4, 1e-3, 2e-3, 4e-3))
    ),
    "scrub, as compared": unlearners.get("scrub", preset="published"),
    "bad-teaching": BadTeaching(),
    "bad-teaching, learning rate chosen": BestOf(
        candidates=tuple(BadTeaching(learning_rate=rate) for rate in (1e-4, 3e-4, 6e-4, 1e-3))
    ),
    "bad-teaching, as compared": unlearners.get("bad-teaching", preset="published"),
}
IN_CONDITION = {
    "exact": tuple(METHODS),
    "half": ("retrain", "fine-tune", "recant (ours)", "potion"),
    "mixed": ("retrain", "fine-tune", "recant (ours)", "potion"),
}


def to_forget(condition: str, poison: PoisonSet, poisoned: TrainingSet, target: int) -> torch.Tensor:
    """The examples that are given as those to forget."""
    if condition == "half":
        return poison.indices[::2]
    if condition == "mixed":
        of_target = (poisoned.labels == target).nonzero()[:, 0]
        innocent = of_target[~torch.isin(of_target, poison.indices)]
        return torch.cat([poison.indices, innocent[: len(poison)]])
    return poison.indices


def trials(seed: int, wanted: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """One victim, healed by each wanted (condition, method)."""
    splits, recipe = data.sample(), Recipe.preset("sample")
    assert splits.test is not None
    names = splits.train.class_names
    source, target = (names.index(name) for name in PAIRS[seed % len(PAIRS)])
    goal = Backdoor(PatchTrigger.white_corner(), source, target)
    poison = attacks.BadNets().craft(goal, splits.train, budget=Budget(count=75), seed=seed)
    poisoned = poison.apply(splits.train)

    def row(condition: str, method: str, model: Any, seconds: float) -> dict[str, Any]:
        measured = measure(model, splits.test, goal)
        assert measured.attack_success is not None
        words = f"{measured.attack_success}, {measured.clean_accuracy}, {seconds:.1f} s"
        say(f"{seed} {condition} {method}: {words}")
        return {
            "seed": seed,
            "attack": f"{names[source]} → {names[target]}",
            "condition": condition,
            "method": method,
            "attack_success": measured.attack_success.rate,
            "clean_accuracy": measured.clean_accuracy.rate,
            "seconds": seconds,
        }

    started = time.process_time()
    victim = train(poisoned, recipe, seed=seed)
    yield row("exact", "victim", victim, time.process_time() - started)
    for condition, method in wanted:
        forget = to_forget(condition, poison, poisoned, target)
        started = time.process_time()
        try:
            healed = METHODS[method].heal(victim, poisoned, forget, seed=seed + 1000)
        except UnpoisonError as error:
            say(f"{seed} {condition} {method}: {error}")
            continue
        yield row(condition, method, healed, time.process_time() - started)


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line a method and condition: means, and the means of the differences from retraining."""
    by_key = {(row["seed"], row["condition"], row["method"]): row for row in rows}
    lines = []
    for condition in IN_CONDITION:
        for method in ("victim", *METHODS):
            own = [row for row in rows if (row["condition"], row["method"]) == (condition, method)]
            pairs = [
                (row, by_key[row["seed"], condition, "retrain"])
                for row in own
                if (row["seed"], condition, "retrain") in by_key
            ]
            if not pairs:
                continue

            def mean(name: str, own: list[dict[str, Any]] = own) -> float:
                return statistics.fmean(row[name] for row in own)

            def apart(name: str, pairs: list[tuple[Any, Any]] = pairs) -> float:
                return statistics.fmean(row[name] - other[name] for row, other in pairs)

            ratio = statistics.fmean(row["seconds"] / other["seconds"] for row, other in pairs)
            lines.append(
                {
                    "condition": condition,
                    "method": method,
                    "victims": len(own),
                    "attack_success": mean("attack_success"),
                    "clean_accuracy": mean("clean_accuracy"),
                    "seconds": mean("seconds"),
                    "attack_success_over_retraining": apart("attack_success"),
                    "clean_accuracy_over_retraining": apart("clean_accuracy"),
                    "part_of_retraining": ratio,
                    "as_good_in_a_fifth": (
                        apart("attack_success") <= 0.01 and apart("clean_accuracy") >= -0.01 and ratio <= 0.2
                    ),
                }
            )
    return lines


def stored() -> list[dict[str, Any]]:
    """The trials that were done."""
    if not RESULTS.exists():
        return []
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text(encoding="utf-8"))["trials"]
    return rows


def _place(row: dict[str, Any]) -> tuple[int, int, int]:
    methods = ("victim", *METHODS)
    return row["seed"], list(IN_CONDITION).index(row["condition"]), methods.index(row["method"])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print the whole record, as one JSON object")
    parser.add_argument("--no-write", action="store_true", help="leave benchmarks/results alone")
    parser.add_argument(
        "--anew", nargs="*", metavar="METHOD", help="do again what was done by these methods, or by all"
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5])
    parser.add_argument("--conditions", nargs="+", default=list(IN_CONDITION), choices=list(IN_CONDITION))
    return parser.parse_args(arguments)


def main() -> None:
    """Measure what is missing, print, and keep the record."""
    options = parse(None)
    torch.set_num_threads(1)
    rows = stored()
    record: dict[str, Any] = {}
    again = set() if options.anew is None else set(options.anew or METHODS)
    for seed in options.seeds:
        done = {
            (row["condition"], row["method"])
            for row in rows
            if row["seed"] == seed and row["method"] not in again
        }
        wanted = [
            (condition, method)
            for condition in options.conditions
            for method in IN_CONDITION[condition]
            if (condition, method) not in done and method in options.methods
        ]
        if wanted:
            found = list(trials(seed, wanted))
            new = {(row["condition"], row["method"]) for row in found}
            rows = stored() if not options.no_write else rows  # another piece may have ended meanwhile
            rows = [
                row for row in rows if row["seed"] != seed or (row["condition"], row["method"]) not in new
            ]
            rows = sorted(rows + found, key=_place)
        lines = summary(rows)
        record = {
            "name": "unlearning",
            "date": datetime.now(UTC).date().isoformat(),
            "command": "python -m benchmarks.unlearning --json",
            "machine": machine(1),
            "as_good_in_a_fifth": [
                line["method"]
                for line in lines
                if line["condition"] == "exact" and line["as_good_in_a_fifth"]
            ],
            "lines": lines,
            "trials": rows,
        }
        if not options.no_write:
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(record if options.json else record["lines"], ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(main())
