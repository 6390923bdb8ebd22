"""Write the tables of README.md and docs/benchmarks.md from what was measured.

    python scripts/make_tables.py            write both
    python scripts/make_tables.py --check    change nothing; end with status 1 when one is out of date

Numbers come from benchmarks/results/*.json and recipes/results/*.json alone, so that nobody types one. A
result that is known but not there is shown as "not measured"; one that is there but not known is shown as it
is. It imports neither torch nor unpoison: it runs wherever Python does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
README: Final = "README.md"
PAGE: Final = "docs/benchmarks.md"
UNLEARNING: Final = "docs/unlearning.md"
DEFENSES: Final = "docs/defenses.md"
DETECTORS: Final = "docs/detectors.md"
RESULTS: Final = ("benchmarks/results", "recipes/results")
BEGIN: Final = "<!-- numbers -->"
END: Final = "<!-- /numbers -->"
NOT_MEASURED: Final = "not measured"
LONGEST: Final = 200
"""Characters of a command in a table; longer ones stand in full only beside their results."""

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One promise: what is measured, in which result, what was wanted, and how the value reads."""

    what: str
    source: str
    wanted: str
    value: Callable[[Record], str]
    command: str

    def cells(self, results: Mapping[str, Record]) -> list[str]:
        """The row as the README shows it."""
        record = results.get(self.source)
        value = NOT_MEASURED if record is None else self.value(record)
        command = self.command if record is None else command_of(record, self.command)
        return [self.what, value, self.wanted, f"`{short(command)}`" if command else ""]


def command_of(record: Record, otherwise: str = "") -> str:
    """The command that made a result."""
    return str(record.get("command", otherwise)).strip()


def short(command: str) -> str:
    """A command that fits into a table: of a long one what is run and the name its result is kept under."""
    if len(command) <= LONGEST:
        return command
    words = shlex.split(command)
    if "--write" not in words:
        return command
    return f"{' '.join(words[:3])} … --write {words[words.index('--write') + 1]}"


def outcome(record: Record) -> Record:
    """The results of a run's record, or of a flat one."""
    inner = record.get("results")
    return inner if isinstance(inner, Mapping) else record


def percent(record: Record, name: str, *, interval: bool = False) -> str:
    """A rate in percent, with its n where it was kept."""
    results = outcome(record)
    value = results.get("measured", {}).get(name, results.get(name))
    if not isinstance(value, Mapping):
        return NOT_MEASURED if value is None else f"{100 * value:.1f} %"
    if value.get("rate") is None:
        return "none to measure on"
    text = f"{100 * value['rate']:.1f} % ({value['successes']:,} of {value['trials']:,})"
    if interval and "interval" in value:
        low, high = value["interval"]
        text += f", {100 * low:.1f} to {100 * high:.1f} %"
    return text


def change(name: str, *, control: bool = False) -> Callable[[Record], str]:
    """A rate before and after healing, and of the model that was never poisoned."""

    def value(record: Record) -> str:
        text = f"{percent(record, f'{name}_before')} → {percent(record, f'{name}_after')}"
        if control and outcome(record).get(f"{name}_control") is not None:
            text += f"; never poisoned: {percent(record, f'{name}_control')}"
        return text

    return value


def rate(name: str) -> Callable[[Record], str]:
    """A rate."""
    return lambda record: percent(record, name)


def total_seconds(record: Record) -> str:
    """The wall-clock time of everything."""
    stages = record.get("seconds") or outcome(record).get("seconds") or {}
    if isinstance(stages, int | float):
        return seconds(stages)
    if not stages:
        return NOT_MEASURED
    return seconds(stages.get("total", sum(stages.values())))


def seconds(value: float) -> str:
    """Seconds with the digits that mean something."""
    if value >= 100:
        return f"{value:,.0f} s"
    return f"{value:.1f} s" if value >= 1 else f"{value:.2g} s"


def ratio(*names: str) -> Callable[[Record], str]:
    """How many times as fast; the least of several."""

    def value(record: Record) -> str:
        found = [record["ratios"][name] for name in names if name in record.get("ratios", {})]
        return f"{min(found):.1f}x" if found else NOT_MEASURED

    return value


def least_ratio(record: Record) -> str:
    """How many times as fast, in the worst case."""
    found = record.get("ratios", {})
    if not found:
        return NOT_MEASURED
    return "; ".join(f"{value:.1f}x ({name})" for name, value in found.items())


def alarms(record: Record) -> str:
    """False alarms on natural errors."""
    results = outcome(record)
    count, errors = results.get("false_alarms"), results.get("errors")
    if count is None or errors is None:
        return NOT_MEASURED
    text = f"{count} of {errors} natural errors"
    if results.get("interval"):
        low, high = results["interval"]
        text += f" (95 % interval {100 * low:.1f} to {100 * high:.1f} %)"
    return text


def with_preset(name: str, value: Callable[[Record], str]) -> Callable[[Record], str]:
    """The value for one preset of a record that holds several."""

    def chosen(record: Record) -> str:
        presets = record.get("presets", {})
        if name not in presets:
            return NOT_MEASURED
        stages = {**record.get("seconds", {}), **presets[name].get("seconds", {})}
        return value({**record, **presets[name], "seconds": stages})

    return chosen


def stages_of_story(record: Record) -> str:
    """Training, tracing and healing, each with its time."""
    words = {"train": "train", "find": "trace", "heal": "heal"}
    told = [
        f"{word} {seconds(record['seconds'][key])}" for key, word in words.items() if key in record["seconds"]
    ]
    return ", ".join(told) or NOT_MEASURED


def tracing(record: Record) -> str:
    """The time of tracing alone."""
    return seconds(record["seconds"]["find"]) if "find" in record["seconds"] else NOT_MEASURED


def beside_retraining(method: str, condition: str) -> Callable[[Record], str]:
    """Attack success and accuracy after an unlearner, and its part of the time of retraining."""

    def value(record: Record) -> str:
        lines = {
            line["method"]: line for line in record.get("lines", []) if line.get("condition") == condition
        }
        if method not in lines or "retrain" not in lines:
            return NOT_MEASURED
        told = [
            f"success {100 * line['attack_success']:.1f} %, accuracy {100 * line['clean_accuracy']:.1f} %"
            for line in (lines[method], lines["retrain"])
        ]
        part, count = lines[method]["part_of_retraining"], lines[method]["victims"]
        return f"{told[0]}, in {part:.2f} of the time; retraining: {told[1]} (means of {count} victims)"

    return value


def finding(attack: str) -> Callable[[Record], str]:
    """The mean average precision of Delta-Influence on an attack, and that of the best other detector."""

    def value(record: Record) -> str:
        found: dict[str, Record] = {}
        for line in record.get("lines", []):
            told = line["average_precision"]
            if line["attack"] == attack and not line["control"] and told["mean"] is not None:
                found[line["detector"]] = told
        ours = next((name for name in found if name.startswith("delta-influence")), None)
        if ours is None:
            return NOT_MEASURED
        mine = found.pop(ours)
        text = f"{mine['mean']:.3f} (n = {mine['n']})"
        if found:
            best = max(found, key=lambda name: found[name]["mean"])
            text += f"; {best}: {found[best]['mean']:.3f}"
        return text

    return value


def held_out(record: Record) -> str:
    """Success after retraining without what Delta-Influence flagged, and how much of the poison that was."""
    told = [
        f"{100 * line['success_rate']['mean']:.1f} %, {percent({'rate': line['caught']}, 'rate')} found"
        for line in record.get("lines", [])
        if line["detector"].startswith("delta-influence") and not line["control"]
    ]
    return "; ".join(told) or NOT_MEASURED


def defended(defense: str) -> Callable[[Record], str]:
    """Attack success and clean accuracy under a defense; of several presets the one hit least."""

    def value(record: Record) -> str:
        lines = [
            line
            for line in record.get("lines", [])
            if line["control"] in ("", "no defense")
            and line["detector"] == "none"
            and line["defense"].split(" ")[0] == defense
        ]
        if not lines:
            return NOT_MEASURED
        least = min(lines, key=lambda line: (line["success"]["rate"], -line["clean_accuracy"]["mean"]))
        success = percent({"rate": least["success"]}, "rate", interval=True)
        return f"{success}; accuracy {100 * least['clean_accuracy']['mean']:.1f} %"

    return value


def concentrated(record: Record) -> str:
    """Both ways to place the poisons; only the first looks ahead less often than the port."""
    spread, dense = ratio("port, to spread")(record), ratio("port, to concentrated")(record)
    looks = record.get("work", {}).get("looks_ahead")
    if looks is None:
        return NOT_MEASURED
    return (
        f"{dense} concentrated ({looks['concentrated']} looks ahead an epoch for "
        f"{looks['spread and port']}); {spread} spread as in the port"
    )


def metapoison_success(budget: float) -> Callable[[Record], str]:
    """Victims like the adversary's at a budget, those of the other attacks, and the clean control."""

    def value(record: Record) -> str:
        found = {
            row["attack"]: percent({"rate": row["success"]}, "rate", interval=row["attack"] == "metapoison")
            for row in record.get("rows", [])
            if row["budget"] == budget and row["victim"] == "same"
        }
        if "metapoison" not in found:
            return NOT_MEASURED
        for row in record.get("ahead", []):
            if row["budget"] == budget and row["victim"] == "same" and row["interval"]:
                points = [f"{100 * value:.0f}" for value in (row["difference"], *row["interval"])]
                found[row["of"]] += ", MetaPoison ahead by {} points ({} to {})".format(*points)
        told = [
            found.pop("metapoison"),
            *(f"{name.replace('-', ' ')}: {rate}" for name, rate in found.items()),
        ]
        for row in record.get("control", []):
            if row["victim"] == "same":
                told.append(f"clean control: {row['success']['successes']} of {row['success']['trials']}")
        return "; ".join(told)

    return value


def transferred(record: Record) -> str:
    """White box, with the layer that fits."""
    found = {
        row["attack"]: row["success"]
        for row in record.get("rows", [])
        if row["knowledge"] == "white box" and row["layer"] == "not augmented, fitted"
    }
    told = [
        f"{100 * found[name]['rate']:.0f} %"
        for name in ("feature-collision-released", "convex-polytope", "bullseye-polytope")
        if name in found
    ]
    if len(told) < 3:
        return NOT_MEASURED
    plain = {
        row["attack"]: f"{100 * row['success']['rate']:.0f} %"
        for row in record.get("rows", [])
        if row["knowledge"] == "white box" and row["layer"] == "as published"
    }
    names = ("feature-collision-released", "convex-polytope", "bullseye-polytope")
    rest = "; layer as published: " + ", ".join(plain[name] for name in names) if plain else ""
    return (
        f"{', '.join(told)} (n = {found['bullseye-polytope']['trials']}; feature collision as released){rest}"
    )


def least_trigger(record: Record) -> str:
    """Of the attacks that change labels at their published budget, the one that succeeds least often."""
    rates = {
        name: attack["success"]
        for name, attack in record.get("attacks", {}).items()
        if attack.get("labels") == "dirty" and attack["success"].get("rate") is not None
    }
    if not rates:
        return NOT_MEASURED
    least = min(rates, key=lambda name: rates[name]["rate"])
    return f"{percent({'rate': rates[least]}, 'rate')}: {least}, of {len(rates)}"


DEMO, INFLUENCE, TRAINING, ALARMS, CIFAR = "demo", "influence", "training", "false_alarms", "cifar10_badnets"
GPU, MATCHING = "cifar10_badnets_gpu", "matching-cifar10"

ROWS: Final = (
    Row("`make demo`: all of it, on two cores", DEMO, "under 150 s", total_seconds, "make demo"),
    Row("its attack success, before → after", DEMO, "≥ 90 % → ≤ 2 %", change("attack_success"), "make demo"),
    Row(
        "its clean accuracy, before → after",
        DEMO,
        "at least never poisoned, less 1 point",
        change("clean_accuracy", control=True),
        "make demo",
    ),
    Row("its recall: poison that was flagged", DEMO, "≥ 98 %", rate("recall"), "make demo"),
    Row("its precision: flagged that was poison", DEMO, "≥ 80 %", rate("precision"), "make demo"),
    Row(
        "influence of 50 transforms on 5,000 images, against kronfluence one query at a time",
        INFLUENCE,
        "≥ 30x",
        ratio("kronfluence query by query"),
        "python -m benchmarks.influence --json",
    ),
    Row(
        "the same, against kronfluence's best batched use",
        INFLUENCE,
        "≥ 3x",
        ratio("kronfluence batched"),
        "python -m benchmarks.influence --json",
    ),
    Row(
        "EK-FAC factors, against kronfluence's fastest setting",
        INFLUENCE,
        "≥ 1x",
        ratio("kronfluence factors"),
        "python -m benchmarks.influence --json",
    ),
    Row(
        "training, against the usual `DataLoader` loop",
        TRAINING,
        "≥ 2x",
        least_ratio,
        "python -m benchmarks.training --json",
    ),
    Row(
        "false alarms of `calibrated` on an unpoisoned model",
        ALARMS,
        "stated level: 1 %",
        alarms,
        "",
    ),
    *(
        Row(what, CIFAR, "", with_preset("calibrated", value), "")
        for what, value in (
            ("BadNets on all of CIFAR-10, small ResNet: attack success", change("attack_success")),
            ("its clean accuracy", change("clean_accuracy", control=True)),
            ("its recall", rate("recall")),
            ("its precision", rate("precision")),
            ("its time", stages_of_story),
        )
    ),
    Row(
        "an unlearner of ours beside retraining, BadNets on the sample",
        "unlearning",
        "within 1 point, in a fifth of the time",
        beside_retraining("recant (ours)", "exact"),
        "python -m benchmarks.unlearning --json",
    ),
    Row(
        "TRAK on 5,000 images, against `traker` with its CPU projector",
        "trak",
        "≥ 20x",
        ratio("traker"),
        "python -m benchmarks.trak --json",
    ),
    Row(
        "the detectors that ART has too, against ART",
        "detectors",
        "≥ 1x",
        least_ratio,
        "python -m benchmarks.detectors --json",
    ),
    Row(
        "average precision of Delta-Influence on BadNets; of the best other detector",
        "detectors-sample",
        "the highest",
        finding("badnets"),
        "unpoison bench recipes/detectors-sample.toml",
    ),
    Row(
        "the same on a smooth trigger",
        "detectors-sample",
        "the highest",
        finding("smooth-trigger"),
        "unpoison bench recipes/detectors-sample.toml",
    ),
    Row(
        "Delta-Influence where nobody looked while it was made: BadNets; smooth trigger",
        "delta-influence-held-out",
        "≤ 2 % success after retraining",
        held_out,
        "unpoison bench recipes/delta-influence-held-out.toml",
    ),
    Row(
        "average precision on gradient matching, a fine-tuned network; of the best other",
        "detectors-matching",
        "the highest",
        finding("gradient-matching"),
        "unpoison bench recipes/detectors-matching.toml",
    ),
    Row(
        "the same where nobody looked",
        "delta-influence-matching-held-out",
        "the highest",
        finding("gradient-matching"),
        "unpoison bench recipes/delta-influence-matching-held-out.toml",
    ),
    Row(
        "success there after retraining without what Delta-Influence flagged",
        "delta-influence-matching-held-out",
        "none",
        held_out,
        "",
    ),
    Row(
        "one round of EPIC's selection on 50,000 examples, against submodlib",
        "selection",
        "≥ 25x",
        least_ratio,
        "python -m benchmarks.selection --json",
    ),
    Row(
        "gradient matching, 2 % of a fine-tuning set: targets hit undefended",
        MATCHING,
        "≥ 50 %",
        defended("none"),
        "unpoison bench recipes/matching-cifar10.toml",
    ),
    Row(
        "under EPIC, its presets' best",
        MATCHING,
        "a tenth, at 3 points of accuracy",
        defended("epic"),
        "unpoison bench recipes/matching-cifar10.toml",
    ),
    Row(
        "under feature squeezing, our own",
        MATCHING,
        "a tenth, at 3 points of accuracy",
        defended("feature-squeezing"),
        "unpoison bench recipes/matching-cifar10.toml",
    ),
    Row(
        "the same where nobody looked while it was made; undefended",
        "matching-held-out",
        "a tenth",
        lambda record: f"{defended('feature-squeezing')(record)}; undefended: {defended('none')(record)}",
        "unpoison bench recipes/matching-held-out.toml",
    ),
    Row(
        "crafting by gradient matching, against the public formulation",
        "gradient_matching",
        "",
        least_ratio,
        "python -m benchmarks.gradient_matching --json",
    ),
    Row(
        "MetaPoison's gradients, against the public port's formulation",
        "metapoison",
        "≥ 3x",
        concentrated,
        "python -m benchmarks.metapoison --json",
    ),
    Row(
        "MetaPoison, 2 % of a fine-tuning set: victims hit; others",
        "metapoison_success_fine_tuning_poisoned_trajectory",
        "more than half; MetaPoison ahead",
        metapoison_success(0.02),
        "python -m benchmarks.metapoison_success",
    ),
    Row(
        "MetaPoison from scratch, 5 % of 5,000 images: the same (feature collision with watermark)",
        "metapoison_success_from_scratch",
        "MetaPoison ahead",
        metapoison_success(0.05),
        "python -m benchmarks.metapoison_success",
    ),
    Row(
        "the same at 2 %, 10 poisons in a batch in place of 50, surrogates trained apart",
        "metapoison_success_from_scratch_ten",
        "MetaPoison ahead",
        metapoison_success(0.02),
        "python -m benchmarks.metapoison_success",
    ),
    Row(
        "MetaPoison, a third class, 10 % of a fine-tuning set: victims hit",
        "metapoison_success_third_class_10",
        "more than half",
        metapoison_success(0.1),
        "python -m benchmarks.metapoison_success",
    ),
    Row(
        "feature collision, convex polytope, Bullseye on published transfer set-ups, fitted layer",
        "transfer",
        "the published order: 22, 33, 85 %",
        transferred,
        "python -m benchmarks.transfer",
    ),
    Row(
        "convex polytope, a step, against a loop over poisons",
        "polytope",
        "≥ 10x",
        least_ratio,
        "python -m benchmarks.polytope --json",
    ),
    Row(
        "trigger attacks with changed labels on the sample: the least successful",
        "triggers",
        "≥ 90 %",
        least_trigger,
        "python -m benchmarks.triggers --json",
    ),
    Row(
        "a sweep by two workers on two cores, against one",
        "sweep",
        "≥ 1.6x",
        ratio("one worker over two"),
        "python -m benchmarks.sweep --json",
    ),
    Row(
        "the published experiments on a GPU",
        GPU,
        "published figures",
        lambda record: "see docs/benchmarks.md",
        "",
    ),
)

# The README names these in one row.
GPU_ROWS: Final = tuple(
    Row(what, GPU, wanted, with_preset(preset, value), "")
    for preset in ("published", "calibrated")
    for what, wanted, value in (
        (
            f"ResNet-18 on all of CIFAR-10, `{preset}`, one GPU: attack success",
            "published: 99.1 % → 0.4 %",
            change("attack_success"),
        ),
        ("its clean accuracy", "published, after: 91.6 %", change("clean_accuracy", control=True)),
        ("its recall", "authors' notes: 99 %", rate("recall")),
        ("its precision", "authors' notes: 17.6 %", rate("precision")),
        ("its time to trace", "published: 43 min (50 queries, CIFAR-100, A100)", tracing),
    )
)


def read_results(root: Path = ROOT) -> dict[str, Record]:
    """All stored results by name."""
    found = {}
    for folder in RESULTS:
        for path in sorted((root / folder).glob("*.json")):
            record = json.loads(path.read_text(encoding="utf-8"))
            found[path.stem] = record if isinstance(record, Mapping) else {"records": record}
    return found


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def numbers(results: Mapping[str, Record], promised: Sequence[Row] = ROWS) -> str:
    """The table of what was promised, by default that of the README."""
    rows = [row.cells(results) for row in promised]
    # A command is named where it changes; ditto reads badly in a table.
    for earlier, later in reversed(list(itertools.pairwise(rows))):
        if later[3] == earlier[3]:
            later[3] = ""
    return table(("what", "measured", "wanted", "made by"), rows)


def in_readme(text: str, results: Mapping[str, Record]) -> str:
    """The README with its table written anew.

    Raises:
        SystemExit: it has no markers.
    """
    return between_markers(README, text, numbers(results))


def between_markers(name: str, text: str, content: str) -> str:
    """A page with what stands between its markers written anew.

    Raises:
        SystemExit: it has no markers.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{name}: needs the lines {BEGIN} and {END}, between which the table goes")
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


def page(results: Mapping[str, Record], root: Path = ROOT) -> str:
    """docs/benchmarks.md."""
    parts = [
        "<!-- Written by scripts/make_tables.py from the stored results; do not edit. -->",
        "# Benchmarks",
        "What was measured, on which machine, by which command. This page is written from the stored results "
        "by `python scripts/make_tables.py`; where there is none, it says so. `make bench` measures the "
        "speeds again.",
        "## What was promised",
        numbers(results, (*ROWS[:-1], *GPU_ROWS)),
    ]
    known = (DEMO, ALARMS, CIFAR, GPU, INFLUENCE, "growth", TRAINING)
    for name in (*known, *(name for name in results if name not in known)):
        record = results.get(name)
        title = TITLES.get(name, name.replace("_", " ").replace("-", " ").capitalize())
        parts.append(f"## {title}")
        if name in STORIES:
            parts.append(STORIES[name])
        if record is None:
            parts.append(f"{NOT_MEASURED.capitalize()}.")
            continue
        written_page = root / "recipes/results" / f"{name}.md"
        if written_page.is_file():
            parts.append(under_title(written_page.read_text(encoding="utf-8")))
            continue
        parts.extend(SPECIFIC.get(name, generic)(record))
        picture = Path("benchmarks/results") / f"{name}.svg"
        if (root / picture).is_file():
            parts.append(f"![{title}](../{picture.as_posix()})")
        parts.append(provenance(record))
    return "\n\n".join(part for part in parts if part) + "\n"


TITLES: Final = {
    DEMO: "The demo",
    ALARMS: "False alarms",
    CIFAR: "BadNets on CIFAR-10",
    GPU: "The published experiment, on one GPU",
    INFLUENCE: "Influence scoring beside kronfluence",
    "growth": "How time and memory grow",
    TRAINING: "Training beside the usual loop",
    "unlearning": "Unlearners beside retraining",
}

STORIES: Final = {
    ALARMS: "Wrong answers of a model that nobody poisoned, each traced with the `calibrated` preset. Each "
    'that is not answered "no poison found" is a false alarm.',
    CIFAR: "All 50,000 images, four-pixel BadNets (500 ships called dogs), a small ResNet; one run.",
    GPU: "The same with ResNet-18 and the published recipe.",
    INFLUENCE: "Same network, images, queries and threads, in one run; the fitting of factors is not counted "
    "in the scoring times.",
    "growth": "Each point is a process of its own, so that its peak memory is its own; memory before the "
    "work is that of Python, torch and the images.",
    TRAINING: "Images a second of one epoch: `unpoison.training.train` against the same network fed by a "
    "`DataLoader` over a map-style dataset with per-image augmentation, without and with worker processes. "
    "The ratio is to the faster of the two.",
    "unlearning": "BadNets on the bundled sample; means over victims, whose classes differ. `exact`: the "
    "poison is given as the examples to forget; `half`: every second poison; `mixed`: the poison and as many "
    "innocent examples of the target class.",
}


def under_title(markdown: str) -> str:
    """A page without its title, its other headings one level down."""
    lines = markdown.strip().splitlines()
    kept = lines[1:] if lines and lines[0].startswith("# ") else lines
    return "\n".join(f"#{line}" if line.startswith("#") else line for line in kept).strip()


def provenance(record: Record) -> str:
    """Command, machine and date in one line."""
    parts = [f"`{command_of(record)}`"] if command_of(record) else []
    machine: dict[str, Any] = {}
    for part in ("machine", "device", "versions"):
        if isinstance(record.get(part), Mapping):
            machine |= record[part]
    if machine:
        named = [str(machine[key]) for key in ("device", "processor", "name") if machine.get(key)]
        named += [
            f"{machine[key]} {key}" for key in ("cores", "threads") if isinstance(machine.get(key), int | str)
        ]
        named += [f"{key} {machine[key]}" for key in ("python", "torch") if machine.get(key)]
        parts.append(", ".join(named))
    date = record.get("date", record.get("started"))
    if date:
        parts.append(str(date)[:10])
    return f"*{'; '.join(parts)}*" if parts else ""


def rates(record: Record) -> Iterator[str]:
    """The results of a whole story, and its stages."""
    results = outcome(record)
    names = [
        name
        for name in results
        if name.startswith(("clean_accuracy", "attack_success"))
        or name in ("precision", "recall", "clean_lost")
    ]
    if names:
        yield table(
            ("rate", "measured"),
            [[name.replace("_", " "), percent(record, name, interval=True)] for name in names],
        )
    plain = {
        name: value
        for name, value in results.items()
        if name not in names
        and isinstance(value, int | float | str | bool)
        and name not in ("fingerprint", "command", "date", "schema", "verb", "seed", "started")
    }
    if plain:
        yield table(
            ("result", "value"), [[name.replace("_", " "), text(value)] for name, value in plain.items()]
        )
    stages = record.get("seconds") or results.get("seconds")
    if isinstance(stages, Mapping) and stages:
        yield table(("stage", "seconds"), [[name, seconds(value)] for name, value in stages.items()])


def cifar(record: Record) -> Iterator[str]:
    """The victim and the control, then every preset."""
    names = ("clean_accuracy_before", "attack_success_before", "clean_accuracy_control")
    yield table(
        ("rate", "measured"),
        [[name.replace("_", " "), percent(record, name, interval=True)] for name in names if name in record],
    )
    presets = record.get("presets", {})
    told = ("flagged", "precision", "recall", "average_precision", "p_value")
    rows = [
        [name.replace("_", " "), *(shown(preset.get(name)) for preset in presets.values())] for name in told
    ]
    rows += [
        [name.replace("_", " "), *(percent(preset, name) for preset in presets.values())]
        for name in ("clean_accuracy_after", "attack_success_after")
    ]
    rows += [
        [f"{word}, seconds", *(shown(preset.get("seconds", {}).get(key)) for preset in presets.values())]
        for key, word in (("find", "tracing"), ("heal", "healing"))
    ]
    yield table(("preset", *presets), rows)
    yield plain_words(record, "recipe")
    rest = [[name, seconds(value)] for name, value in record.get("seconds", {}).items()]
    yield table(("stage", "seconds"), rest) if rest else ""


def shown(value: Any) -> str:
    """A value of a table, or a dash."""
    return "-" if value is None else text(value)


def influence(record: Record) -> Iterator[str]:
    """Ratios, seconds and agreement."""
    taken = record.get("seconds", {})
    pairs = (
        ("50 queries one at a time", "kronfluence_query_by_query", "scores", "kronfluence query by query"),
        ("50 queries in one batch", "kronfluence_batched", "scores", "kronfluence batched"),
        ("fitting the factors", "kronfluence_factors", "factors", "kronfluence factors"),
    )
    yield table(
        ("work", "kronfluence", "unpoison", "times as fast"),
        [
            [what, seconds(taken[theirs]), seconds(taken[ours]), ratio(name)(record)]
            for what, theirs, ours, name in pairs
            if theirs in taken and ours in taken
        ],
    )
    if record.get("agreement"):
        yield "On the same factors, differences of scores agree:"
        yield table(
            ("agreement", "value"),
            [[name.replace("_", " "), f"{value:.4g}"] for name, value in record["agreement"].items()],
        )
    yield plain_words(record, "work")


def growth(record: Record) -> Iterator[str]:
    """Every point, ordered by size."""
    points = sorted(
        record.get("points", []), key=lambda one: (one["queries"] != 50, one["images"], one["queries"])
    )
    yield table(
        (
            "training images",
            "queries",
            "factors",
            "queries made",
            "scores",
            "peak memory",
            "of it before the work",
        ),
        [
            [
                f"{one['images']:,}",
                f"{one['queries']:,}",
                *(seconds(one["seconds"][stage]) for stage in ("factors", "queries", "scores")),
                size(one["peak_bytes"]),
                size(one["peak_bytes_before"]) if "peak_bytes_before" in one else "",
            ]
            for one in points
        ],
    )
    yield plain_words(record, "work")


def training(record: Record) -> Iterator[str]:
    """Images a second of every side."""
    yield table(
        ("case", "images a second"),
        [[name, f"{value:,.0f}"] for name, value in record.get("images_per_second", {}).items()],
    )
    yield table(
        ("against", "times as fast"), [[name, f"{value:.2f}"] for name, value in record["ratios"].items()]
    )


def false_alarms(record: Record) -> Iterator[str]:
    """The count and what it was made with."""
    yield f"{alarms(record)}."
    rest = {
        name: value
        for name, value in outcome(record).items()
        if isinstance(value, int | float | str) and name not in ("command", "date", "false_alarms", "errors")
    }
    if rest:
        yield table(
            ("setting", "value"), [[name.replace("_", " "), text(value)] for name, value in rest.items()]
        )


def unlearning(record: Record) -> Iterator[str]:
    """Every unlearner in every condition, beside retraining."""
    yield table(
        (
            "to forget",
            "unlearner",
            "victims",
            "attack success",
            "clean accuracy",
            "seconds",
            "part of retraining",
            "within a point in a fifth",
        ),
        [
            [
                line["condition"],
                line["method"],
                text(line["victims"]),
                f"{100 * line['attack_success']:.1f} %",
                f"{100 * line['clean_accuracy']:.1f} %",
                f"{line['seconds']:.1f}",
                f"{line['part_of_retraining']:.2f}",
                "yes" if line["as_good_in_a_fifth"] else "",
            ]
            for line in record.get("lines", [])
        ],
    )


def defenses(record: Record | None) -> str:
    """Every defense of a recipe: what it lets through, and what it drops and costs."""
    if record is None:
        return f"{NOT_MEASURED.capitalize()}."
    none = next(line for line in record["lines"] if line["control"] == "no defense")
    usual = none["costs"]["seconds"]["train"]
    rows = []
    for line in record["lines"]:
        success = line["success"]
        low, high = success["interval"]
        dropped = "dropped" in line and line["dropped"]["successes"] > 0
        rows.append(
            [
                line["control"] if line["defense"] == "none" else line["defense"],
                f"{success['successes']} of {success['trials']} ({100 * low:.0f} to {100 * high:.0f} %)",
                f"{100 * line['clean_accuracy']['mean']:.1f} %",
                f"{100 * line['dropped']['rate']:.1f} %" if dropped else "",
                f"{100 * line['drop_recall']['rate']:.1f} %" if dropped else "",
                f"{line['costs']['seconds']['train'] / usual:.1f}",
            ]
        )
    header = ("defense", "targets hit", "accuracy", "examples dropped", "poisons dropped", "time of training")
    return "\n\n".join((table(header, rows), provenance(record)))


def _found(results: Mapping[str, Record]) -> str:
    names = ("detectors-sample", "detectors-matching", "delta-influence-matching-held-out")
    return "\n\n".join(found_by(results.get(name)) for name in names)


def found_by(record: Record | None) -> str:
    """Every detector of a recipe: how it ranks, what it flags, and what the attack can do afterwards."""
    if record is None:
        return f"{NOT_MEASURED.capitalize()}."
    header = (
        "attack",
        "detector",
        "average precision",
        "poison flagged",
        "of the flagged, poison",
        "attack success after retraining",
        "accuracy",
    )
    rows = []
    for line in record["lines"]:
        if line["control"] == "random filter":
            continue
        judged = line["detector"] != "none"
        mean = line["average_precision"]["mean"]
        rows.append(
            [
                line["attack"],
                line["detector"] if judged else line["control"],
                f"{mean:.3f}" if judged and mean is not None else "",
                percent({"rate": line["caught"]}, "rate") if judged else "",
                percent({"rate": line["precision"]}, "rate") if judged else "",
                f"{100 * line['success_rate']['mean']:.1f} %",
                f"{100 * line['clean_accuracy']['mean']:.1f} %",
            ]
        )
    return "\n\n".join((table(header, rows), provenance(record)))


def generic(record: Record) -> Iterator[str]:
    """Any record: what is flat as one table, each nested part as another, a configuration as one line."""
    hidden = ("machine", "device", "versions", "date", "started", "command", "schema")
    flat = [
        [name.replace("_", " "), text(value)]
        for name, value in record.items()
        if name not in hidden and not isinstance(value, Mapping | list)
    ]
    if flat:
        yield table(("result", "value"), flat)
    for name, value in record.items():
        if name in hidden or not value:
            continue
        if name in ("recipe", "metapoison"):
            yield f"{name}: {text(value)}"
        elif isinstance(value, Mapping):
            rows = [[str(key).replace("_", " "), text(inner)] for key, inner in value.items()]
            yield table((name.replace("_", " "), "value"), rows)
        elif isinstance(value, list) and all(isinstance(one, Mapping) for one in value):
            columns = list(dict.fromkeys(key for one in value for key in one))
            yield table(
                [column.replace("_", " ") for column in columns],
                [[text(one.get(column, "")) for column in columns] for one in value],
            )
        elif isinstance(value, list):
            yield f"{name.replace('_', ' ')}: {text(value)}"


def text(value: Any) -> str:
    """Any JSON value in a cell."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        if {"rate", "successes", "trials"} <= set(value):
            return percent({"rate": value}, "rate")
        return ", ".join(f"{str(name).replace('_', ' ')} {text(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        shown = ", ".join(text(inner) for inner in value[:20])
        return shown + (f", ... ({len(value)} in all)" if len(value) > 20 else "")
    return "" if value is None else " ".join(str(value).split())


def plain_words(record: Record, name: str) -> str:
    """The flat part of a mapping as one sentence."""
    flat = {
        key: value for key, value in record.get(name, {}).items() if not isinstance(value, Mapping | list)
    }
    words = "; ".join(f"{key.replace('_', ' ')}: {text(value)}" for key, value in flat.items())
    return f"The {name}: {words}." if words else ""


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e6:,.0f} MB"


SPECIFIC: Final[Mapping[str, Callable[[Record], Iterator[str]]]] = {
    DEMO: rates,
    CIFAR: cifar,
    GPU: cifar,
    INFLUENCE: influence,
    "growth": growth,
    TRAINING: training,
    ALARMS: false_alarms,
    "unlearning": unlearning,
}


def written(root: Path = ROOT) -> dict[str, str]:
    """What the files must hold."""
    results = read_results(root)
    readme = (root / README).read_text(encoding="utf-8")
    healing = (root / UNLEARNING).read_text(encoding="utf-8")
    record = results.get("unlearning")
    told = f"{NOT_MEASURED.capitalize()}."
    if record is not None:
        told = "\n\n".join((*unlearning(record), provenance(record)))
    tracing_page = (root / DETECTORS).read_text(encoding="utf-8")
    withstanding = (root / DEFENSES).read_text(encoding="utf-8")
    return {
        README: in_readme(readme, results),
        PAGE: page(results, root),
        UNLEARNING: between_markers(UNLEARNING, healing, told),
        DEFENSES: between_markers(DEFENSES, withstanding, defenses(results.get(MATCHING))),
        DETECTORS: between_markers(DETECTORS, tracing_page, _found(results)),
    }


def main() -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; 1 when a file is out of date")
    check = parser.parse_args().check
    stale = []
    for name, content in written().items():
        path = ROOT / name
        if path.is_file() and path.read_text(encoding="utf-8") == content:
            continue
        stale.append(name)
        if not check:
            path.write_text(content, encoding="utf-8", newline="\n")
            print(f"written: {name}")
    if check and stale:
        print(f"out of date: {', '.join(stale)}; run python scripts/make_tables.py", file=sys.stderr)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
