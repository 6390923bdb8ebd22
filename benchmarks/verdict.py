"""The verdict of the calibrated detector: false alarms, power and healing.

    unpoison bench recipes/verdict-NAME.toml --out STORES/verdict-NAME    of each of these recipes
    python -m benchmarks.verdict [--stores STORES] [--json]

Pools the trials of the recipes `verdict-*` in the folder of stores with those that were pooled before; of one
network and input the new one is kept, with the repair of the old one where it has none of its own and the
flags are equal. False alarms are natural errors, and right answers whose truth is not given, whose p-value is
at most the level; networks are clean unless the row says otherwise. Power is of victims whose trigger works
on more than half of the adversary's test inputs; one input of a victim is traced, or four with one answer
together where the row says so. Nothing was chosen on these networks and pairs; the ledger says what had been
looked at. Healed: after `repair` at most 2 % of the inputs are still answered as the adversary wants, and
accuracy is within one point of that after the perfect filter. Some smooth triggers work on networks without
any poison, too; one row leaves out those that the perfect filter does not heal either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks._harness import RESULTS, Bench, main, say, tally
from benchmarks._tables import Record, percent, rates_of, table
from unpoison.evaluation import Results

LEVELS: Final = {"01": 0.01, "05": 0.05}
ANSWERS: Final = ("errors", "right")
SETS: Final = ("sample", "signs", "cifar10", "cifar100")
PLACE: Final = ("attack", "budget", "source", "target", "victim", "seed", "number")
KEPT: Final = (
    *("observation", "p_value", "found", "cause", "poisons", "flagged", "true_positives"),
    *("seconds_calibrate", "seconds_find", "average_precision"),
)
REPAIR: Final = ("rounds", "outcome", "removed", "removed_poisons")
REPAIRED: Final = (
    *(f"{what}_{when}" for what in ("success", "accuracy") for when in ("after", "perfect")),
    *REPAIR,
)
SAME: Final = ("success", "accuracy", "flagged", "true_positives")
"""What must be equal for a repair to be of the same network and flags."""
AFTER: Final = ("works after", "after the perfect filter", "rounds")
PICTURE: Final = RESULTS.parents[1] / "docs" / "images" / "verdict-p-values.svg"
ROUNDING: Final = 1e-9
HEALED: Final = 0.02


def measure(bench: Bench) -> None:
    """Read the stores, pool, and draw the p-values."""
    new: dict[tuple[Any, ...], dict[str, Any]] = {}
    for trial in trials(Path(bench.options.stores)):  # a recipe that heals has victims of another
        new.setdefault(identity(trial), {}).update(trial)
    if not new:
        raise SystemExit(f"{bench.options.stores}: holds no store of a recipe verdict-*; name it by --stores")
    bench.trials[:] = pooled(bench.trials, new.values())
    summarise(bench)
    if not (bench.options.no_write or bench.options.quick):
        draw(bench.trials)
    say(f"{len(bench.trials)} trials")


def pooled(before: Iterable[Mapping[str, Any]], new: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The new trials in place of those before, each with the repair that was known of the same flags."""
    found = {identity(one): dict(one) for one in before}
    for trial in new:
        old = found.get(identity(trial), {})
        repair = {name: old[name] for name in REPAIRED if name in old}
        kept = repair if all(old.get(name) == trial[name] for name in SAME) else {}
        found[identity(trial)] = {**kept, **trial}
    return list(found.values())


def trials(stores: Path) -> Iterator[dict[str, Any]]:
    """What was traced, a row each, with the attack's success before and after."""
    for store in sorted(stores.glob("verdict-*/")):
        results = Results.read(store)
        rows = results.table.to_pylist()
        before = {place(row): row for row in rows if row["control"] == "no defense"}
        perfect = {place(row): row for row in rows if row["control"] == "perfect filter"}
        for row in rows:
            if row["control"] or row["p_value"] is None:
                continue
            asked = next((one for one in ANSWERS if f"answers {one}" in row["detector"]), "attack")
            victim = before.get(place(row))
            trial = {
                "set": next(name for name in reversed(SETS) if name in results.name),
                "asked": asked,
                "several": "inputs " in row["detector"],
                "success": None if victim is None else success(victim),
                "accuracy": None if victim is None else accuracy(victim),
                **{name: row[name] for name in (*PLACE, *KEPT)},
            }
            if row["unlearner"] != "none" and asked == "attack" and place(row) in perfect:
                for when, one in (("after", row), ("perfect", perfect[place(row)])):
                    trial |= {f"success_{when}": success(one), f"accuracy_{when}": accuracy(one)}
                trial |= {name: row[name] for name in REPAIR}
            yield trial


def place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Which victim it is."""
    return tuple(row[name] for name in PLACE)


def identity(trial: Mapping[str, Any]) -> tuple[Any, ...]:
    """Which input of which network was traced."""
    return (trial["set"], place(trial), trial["asked"], trial["several"], trial["observation"])


def success(row: Mapping[str, Any]) -> float:
    """The share of the adversary's inputs that are answered as wanted."""
    return float(row["attack_successes"]) / row["attack_total"]


def accuracy(row: Mapping[str, Any]) -> float:
    """The share of clean test images that are answered rightly."""
    return float(row["clean_correct"]) / row["clean_total"]


def alarms(chosen: Sequence[Mapping[str, Any]], level: float) -> dict[str, int]:
    """How many p-values are at most the level."""
    return tally(one["p_value"] <= level + ROUNDING for one in chosen)


def summarise(bench: Bench) -> None:
    """The rates, from the trials."""

    def traced(asked: str, *, clean: bool | None = None, several: bool = False) -> list[dict[str, Any]]:
        own = [one for one in bench.trials if (one["asked"], one["several"]) == (asked, several)]
        return [one for one in own if clean is None or (one["attack"] == "none") == clean]

    rates, errors = bench.rates, traced("errors", clean=True)
    groups = {
        "": errors,
        "_poisoned": traced("errors", clean=False),
        "_right": traced("right", clean=True),
        "_several": traced("errors", clean=True, several=True),
        "_several_poisoned": traced("errors", clean=False, several=True),
    }
    groups |= {f"_{name}": [one for one in errors if one["set"] == name] for name in SETS}
    for suffix, chosen in groups.items():
        for name, level in LEVELS.items():
            rates[f"false_alarms_{name}{suffix}"] = alarms(chosen, level)
    working, working_several = (
        [one for one in traced("attack", several=several) if (one["success"] or 0) > 0.5]
        for several in (False, True)
    )
    found = [one for one in working if one["found"]]
    rates["found"] = tally(one["found"] for one in working)
    for budget in sorted({one["budget"] for one in working}):
        own = (one["found"] for one in working if one["budget"] == budget)
        rates[f"found, {100 * budget:g} %"] = tally(own)
    for name in SETS:
        rates[f"found, {name}"] = tally(one["found"] for one in working if one["set"] == name)
    rates["found, several inputs"] = tally(one["found"] for one in working_several)
    rates["p at most .05"] = alarms(working, 0.05)
    rates["recall of those found"] = true_positives(found, "poisons")
    rates["precision"] = true_positives(found, "flagged")
    rates["recall of all"] = true_positives(working, "poisons")
    rates["recall, several inputs"] = true_positives(working_several, "poisons")
    rates["precision, several inputs"] = true_positives(working_several, "flagged")
    for name in ("recall of those found", "precision"):
        whole = rates[name]
        key = name.partition(" ")[0]
        bench.agreement[key] = whole["successes"] / whole["trials"] if whole["trials"] else None
    repaired = [one for one in found if one.get("rounds") is not None]
    curable = [one for one in repaired if one["success_perfect"] <= HEALED]
    rates["healed"] = tally(map(healed, repaired))
    rates["healed, of those that the perfect filter heals"] = tally(map(healed, curable))
    rates["no longer works, of those"] = tally(one["success_after"] <= HEALED for one in curable)
    rates["last trace empty"] = tally(one["outcome"] != "poison remains" for one in repaired)
    for rounds in sorted({one["rounds"] for one in repaired}):
        rates[f"rounds, {rounds}"] = tally(one["rounds"] == rounds for one in repaired)


def healed(trial: Mapping[str, Any]) -> bool:
    """Whether the repaired network neither obeys the trigger nor lost accuracy."""
    kept = trial["accuracy_after"] >= trial["accuracy_perfect"] - 0.01 - ROUNDING
    return bool(trial["success_after"] <= HEALED) and kept


def true_positives(chosen: Sequence[Mapping[str, Any]], whole: str) -> dict[str, int]:
    """The true positives of all, of their poison or of what was flagged."""
    return {
        part: sum(one[name] for one in chosen)
        for part, name in (("successes", "true_positives"), ("trials", whole))
    }


def draw(found: Sequence[Mapping[str, Any]]) -> None:
    """The p-values of natural errors and of triggered inputs beside the uniform distribution."""
    from recipes.plots import uniform

    errors = [one for one in found if one["asked"] == "errors" and not one["several"]]
    curves = {name: [one for one in errors if (one["set"], one["attack"]) == (name, "none")] for name in SETS}
    curves["errors of poisoned networks"] = [one for one in errors if one["attack"] != "none"]
    known = {f"{name} (n = {len(chosen)})": chosen for name, chosen in curves.items() if chosen}
    PICTURE.parent.mkdir(exist_ok=True)
    uniform({name: [one["p_value"] for one in chosen] for name, chosen in known.items()}).savefig(PICTURE)


def tables(record: Record) -> Iterator[str]:
    """The rates, and a row for every victim."""
    yield rates_of(record)
    yield "![p-values of natural errors beside the uniform distribution](../images/verdict-p-values.svg)"
    rows = [
        [
            one["set"],
            one["attack"],
            f"{100 * one['budget']:g} %",
            f"{one['source']} → {one['target']}",
            percent(one["success"]),
            f"{one['p_value']:.4f}",
            "yes" if one["found"] else "no",
            f"{one['true_positives']} of {one['poisons']}" if one["found"] else "",
            str(one["flagged"] - one["true_positives"]) if one["found"] else "",
            f"{one['average_precision']:.3f}",
            percent(one["success_after"]) if "success_after" in one else "",
            percent(one["success_perfect"]) if "success_perfect" in one else "",
            f"{one['rounds']}, {one['outcome']}" if one.get("outcome") else "",
        ]
        for one in record["trials"]
        if one["asked"] == "attack" and not one["several"]
    ]
    header = ("set", "attack", "budget", "classes", "trigger works", "p", "found", "poison flagged")
    yield table((*header, "false positives", "average precision", *AFTER), rows)


if __name__ == "__main__":
    main(measure, stores="stores")
