"""What recipes gave: detectors, defenses, and how both did on attacks that were held out.

`unpoison bench recipes/NAME.toml` makes a result, `python -m recipes.keep STORE` keeps it as
recipes/results/NAME.json, with a page of all columns beside it, which is shown after the table here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from benchmarks._tables import Record, Row, Section, generic, percent, proportion, seconds, table, text

CALIBRATED: Final = "calibrated"
FILTER: Final = "recompression-filter"
COLUMNS: Final[Mapping[str, Callable[[Record], Any]]] = {
    "attack": lambda line: line["attack"],
    "method": lambda line: next(
        (line[kind] for kind in ("detector", "defense") if line[kind] != "none"), line["control"]
    ),
    "targets hit": lambda line: proportion(line["success"]),
    "success rate": lambda line: told(line["success_rate"]),
    "accuracy": lambda line: told(line["clean_accuracy"]),
    "average precision": lambda line: text(line["average_precision"]["mean"]),
    "poison flagged": lambda line: share(line, "true_positives"),
    "of the flagged, poison": lambda line: share(line, "precision"),
    "poison dropped": lambda line: share(line, "drop_recall"),
    "of the set dropped": lambda line: share(line, "dropped"),
}


def share(line: Record, name: str) -> str:
    """A rate of a line, where there is something to count."""
    return proportion(line[name], interval=False) if line.get(name, {}).get("trials") else ""


def marked(line: Record) -> tuple[Record, Record]:
    """What was flagged of the poison and of the clean; of inputs, at a false-positive rate of 1 %."""
    kind = "screened_{}_01" if "screened_true_01" in line else "{}_positives"
    return line[kind.format("true")], line[kind.format("false")]


def told(value: Record) -> str:
    """A mean, or the rate that it is where the trial was one."""
    if "trials" in value:
        return proportion(value, interval=False)
    return "" if value["mean"] is None else percent(value["mean"])


def lines(record: Record) -> Iterator[str]:
    """What the recipe says of itself, the most telling columns of every method, then all columns."""
    yield record.get("experiment", {}).get("description", "")
    shown = [line for line in record["lines"] if line["control"] != "random filter"]
    yield table(tuple(COLUMNS), [[column(line) for column in COLUMNS.values()] for line in shown])
    yield from generic(record) if "page" in record else ()


def side_by_side(record: Record) -> Iterator[str]:
    """What the recipe says of itself, and methods against attacks, where its page has them."""
    yield record["experiment"]["description"]
    before, _, _ = record["page"].partition("| Method | Attack |")
    matrices = before[before.find("\n**") + 1 :].strip()
    yield from [matrices] if matrices.startswith("**") else generic(record)


def line_of(record: Record, **wanted: str) -> Record:
    """The line of a method or a control."""
    return next(line for line in record["lines"] if wanted.items() <= line.items())


def ranking(attack: str) -> Callable[[Record], str]:
    """The mean average precision of the calibrated detector on an attack, and that of the best other."""

    def value(record: Record) -> str:
        found: dict[str, Any] = {
            line["detector"]: line["average_precision"]
            for line in record["lines"]
            if line["attack"] == attack
            and not line["control"]
            and line["average_precision"]["mean"] is not None
        }
        if CALIBRATED not in found:
            return ""
        mine, others = found.pop(CALIBRATED), {name: one["mean"] for name, one in found.items()}
        best = max(others, key=lambda name: others[name]) if others else ""
        return f"{mine['mean']:.3f} (n = {mine['n']})" + (f"; {best}: {others[best]:.3f}" if best else "")

    return value


def held_out(detector: str = CALIBRATED) -> Callable[[Record], str]:
    """Success after retraining without what was flagged, and how much of the poison that was."""

    def value(record: Record) -> str:
        return "; ".join(
            f"{percent(line['success_rate']['mean'])}, {share(line, 'true_positives')} found"
            for line in record["lines"]
            if line["detector"] == detector and not line["control"]
        )

    return value


def defended(*defenses: str, attack: str = "") -> Callable[[Record], str]:
    """Attack success and clean accuracy under each defense; of several presets the one hit least."""

    def value(record: Record) -> str:
        parts = []
        for defense in defenses:
            own = [
                line
                for line in record["lines"]
                if line["control"] in ("", "no defense")
                and line["detector"] == "none"
                and line["attack"].startswith(attack)
                and line["defense"].split(" ")[0] == defense
            ]
            least = min(own, key=lambda line: (line["success"]["rate"], -line["clean_accuracy"]["mean"]))
            words = f"{proportion(least['success'])}; accuracy {percent(least['clean_accuracy']['mean'])}"
            parts.append(f"undefended: {words}" if parts else words)
        return "; ".join(parts)

    return value


def healed_by(what: str, detector: str, wanted: Mapping[str, str], recipe: str = "") -> tuple[Row, ...]:
    """The rows of one experiment: attack, healing by retraining without what a detector flagged, and time."""

    def change(field: str, *, control: bool) -> Callable[[Record], str]:
        def value(record: Record) -> str:
            before, after, clean = (
                told(line_of(record, **place)[field])
                for place in ({"control": "no defense"}, {"detector": detector}, {"control": "no attack"})
            )
            return f"{before} → {after}" + (f"; never poisoned: {clean}" if control else "")

        return value

    def spent(record: Record) -> str:
        taken = line_of(record, detector=detector)["costs"]["seconds"]
        stages = (("train", "train"), ("find", "trace"), ("heal", "heal"))
        return ", ".join(f"{word} {seconds(taken[stage])}" for stage, word in stages)

    rows = {
        f"{what}: attack success": change("success_rate", control=False),
        "its clean accuracy": change("clean_accuracy", control=True),
        "its recall": lambda record: share(line_of(record, detector=detector), "true_positives"),
        "its precision": lambda record: share(line_of(record, detector=detector), "precision"),
        "its time": spent,
    }
    return tuple(
        Row(name, wanted.get(name.rpartition(": ")[2], ""), value, recipe) for name, value in rows.items()
    )


def section(name: str, title: str, *rows: Row) -> Section:
    """The section of a recipe."""
    return Section(name, title, rows=rows, tables=lines)


PUBLISHED: Final = {
    "attack success": "published: 99.1 % → 0.4 %",
    "its clean accuracy": "published, after: 91.6 %",
    "its recall": "authors' notes: 99 %",
    "its precision": "authors' notes: 17.6 %",
    "its time": "published: 43 min to trace (50 queries, CIFAR-100, A100)",
}
MATCHING: Final = ranking("gradient-matching")
BEST, TENTH = "the highest", "a tenth, at 3 points of accuracy"
ON_CIFAR: Final = (
    section(
        "badnets-cifar10",
        "BadNets on CIFAR-10",
        *healed_by("BadNets on all of CIFAR-10, small ResNet", CALIBRATED, {}, "badnets-cifar10"),
    ),
    section(
        "badnets-cifar10-gpu",
        "The published experiment, on one GPU",
        *healed_by("ResNet-18 on all of CIFAR-10, `delta-influence`", "delta-influence", PUBLISHED),
        *healed_by("ResNet-18 on all of CIFAR-10, `calibrated`", CALIBRATED, PUBLISHED),
    ),
)
DETECTORS: Final = (
    section(
        "detectors-sample",
        "Backdoors on the sample",
        Row("average precision of `calibrated` on BadNets; best other", BEST, ranking("badnets")),
        Row("its average precision on a smooth trigger; best other", BEST, ranking("smooth-trigger")),
    ),
    section(
        "delta-influence-held-out",
        "Backdoors that were held out",
        Row(
            "attacks that were held out: BadNets; smooth trigger",
            "≤ 2 % success after retraining",
            held_out(),
        ),
        Row(
            "the same, four inputs traced together",
            "≤ 2 % success after retraining",
            held_out(f"{CALIBRATED} (inputs 4)"),
        ),
    ),
    section(
        "detectors-matching",
        "Gradient matching",
        Row("its average precision on gradient matching; best other", BEST, MATCHING),
    ),
    section(
        "delta-influence-matching-held-out",
        "Gradient matching that was held out",
        Row("the same, attacks that were held out; best other", BEST, MATCHING),
        Row("success there after retraining without what `calibrated` flagged", "none", held_out()),
    ),
    section(
        "matching-through-jpeg",
        "Gradient matching through JPEG",
        Row("average precision where poison is crafted through JPEG and shifts; best other", "", MATCHING),
        Row("success there after retraining without what `calibrated` flagged", "none", held_out()),
        Row("success there under the recompression filter", "a tenth", defended(FILTER, "none")),
    ),
    section("badnets-sample", "BadNets on the sample"),
    *(
        section(f"verdict-{name}", f"The verdict: {title}")
        for name, title in {
            "null-sample": "clean networks of the sample",
            "null-signs": "clean networks of traffic signs",
            "null-cifar10": "a clean network of CIFAR-10",
            "null-cifar100": "a clean network of CIFAR-100",
            "sample": "poisoned networks of the sample",
            "sample-power": "further poisoned networks of the sample",
            "signs": "poisoned networks of traffic signs",
            "signs-power": "further poisoned networks of traffic signs",
            "cifar10": "poisoned networks of CIFAR-10",
            "cifar100": "poisoned networks of CIFAR-100",
            "several-null-sample": "clean networks of the sample, four errors together",
            "several-null-signs": "clean networks of traffic signs, four errors together",
            "several-sample": "poisoned networks of the sample, four inputs together",
        }.items()
    ),
)
DEFENSES: Final = (
    section(
        "matching-cifar10",
        "Gradient matching",
        Row("gradient matching, 2 % of a fine-tuning set, undefended", "≥ 50 %", defended("none")),
        Row("under EPIC, its presets' best", TENTH, defended("epic")),
        Row("under the recompression filter, our own", TENTH, defended(FILTER)),
    ),
    section(
        "matching-held-out",
        "Gradient matching that was held out",
        Row("the same on attacks that were held out", "a tenth", defended(FILTER, "none")),
    ),
    section("matching-adaptive", "Gradient matching that knows the filter"),
    section(
        "epic-transfer",
        "Transfer learning",
        *(
            Row(f"{title} on published transfer set-ups: {what}", wanted, defended(*names, attack=attack))
            for attack, title in (("bullseye", "Bullseye polytope"), ("feature", "feature collision"))
            for what, wanted, names in (
                ("EPIC, its presets' best", TENTH, ("epic", "none")),
                ("the recompression filter", TENTH, (FILTER,)),
            )
        ),
    ),
)
EACH: Final = tuple(
    Section(f"table-{name}", title, about, tables=side_by_side)
    for name, title, about in (
        (
            "sample-detectors",
            "Detectors, on the sample",
            "A third of the examples with the target label are poison, more than tracing is made for: "
            "medians are of clean examples where these are the most. TaCT and the adaptive attacks add "
            "covers, images with the trigger and their own label.",
        ),
        (
            "cifar10-detectors",
            "Detectors, on a part of CIFAR-10",
            "The network is small and trained without augmentation, in which these attacks take hold; it is "
            "right on half of the clean images, so natural errors are many.",
        ),
        ("sample-clean", "Detectors, on clean networks of the sample", ""),
        (
            "sample-defenses",
            "Defenses, on the sample",
            "DP-SGD refuses networks with batch normalisation, so its 18 trials are missing.",
        ),
        ("cifar10-defenses", "Defenses, on a part of CIFAR-10", ""),
        ("sample-unlearners", "Unlearners, on the sample", ""),
        ("cifar10-unlearners", "Unlearners, on a part of CIFAR-10", ""),
    )
)
