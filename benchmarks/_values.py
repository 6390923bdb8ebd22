"""The values that the tables read from stored results, by the names that sections.toml and guide.toml use.

`unpoison bench recipes/NAME.toml` makes the result of a recipe, `python -m recipes.keep STORE` keeps it as
recipes/results/NAME.json, with a page of all columns beside it, which is shown after the table here.
MetaPoison's success (metapoison_success_*), the transfer of feature-space attacks (transfer) and what the
findings of Delta-Influence carry (delta_influence_studies) were measured before recipes could express them:
each result names the command and date that made it; its script is gone. It goes when a recipe has measured
it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from benchmarks._tables import Record, against, generic, percent, proportion, seconds, table, text

CALIBRATED: Final = "calibrated"
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
POLYTOPES: Final = ("feature-collision-released", "convex-polytope", "bullseye-polytope")


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


def share(line: Record, name: str) -> str:
    """A rate of a line, where there is something to count."""
    return proportion(line[name], interval=False) if line.get(name, {}).get("trials") else ""


def told(value: Record) -> str:
    """A mean, or the rate that it is where the trial was one."""
    if "trials" in value:
        return proportion(value, interval=False)
    return "" if value["mean"] is None else percent(value["mean"])


def mean(line: Record) -> str:
    """Success with the number of trials."""
    rate = line["success_rate"]
    return told(rate) + (f" (mean of {rate['n']})" if "n" in rate else "")


def line_of(record: Record, **wanted: str) -> Record:
    """The line of a method or a control."""
    return next(line for line in record["lines"] if wanted.items() <= line.items())


def rate(record: Record, name: str) -> str:
    """A rate by its name; "" where it had no trial."""
    return share(record["rates"], name)


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


def marked(line: Record) -> tuple[Record, Record]:
    """What was flagged of the poison and of the clean; of inputs, at a false-positive rate of 1 %."""
    kind = "screened_{}_01" if "screened_true_01" in line else "{}_positives"
    return line[kind.format("true")], line[kind.format("false")]


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


def ranking(record: Record, attack: str) -> str:
    """The mean average precision of the calibrated detector on an attack, and that of the best other."""
    precisions: dict[str, Any] = {
        line["detector"]: line["average_precision"]
        for line in record["lines"]
        if line["attack"] == attack and not line["control"] and line["average_precision"]["mean"] is not None
    }
    if CALIBRATED not in precisions:
        return ""
    mine, others = precisions.pop(CALIBRATED), {name: one["mean"] for name, one in precisions.items()}
    best = max(others, key=lambda name: others[name]) if others else ""
    return f"{mine['mean']:.3f} (n = {mine['n']})" + (f"; {best}: {others[best]:.3f}" if best else "")


def retrained(record: Record, detector: str) -> str:
    """Success after retraining without what was flagged, and how much of the poison that was."""
    return "; ".join(
        f"{percent(line['success_rate']['mean'])}, {share(line, 'true_positives')} found"
        for line in record["lines"]
        if line["detector"] == detector and not line["control"]
    )


def defended(record: Record, of: Mapping[str, Any]) -> str:
    """Attack success and clean accuracy under each of the `defenses`; of several presets the one hit least.

    `attack`: how the names of the attacks begin; by default all of the record's.
    """
    parts = []
    for defense in of["defenses"]:
        own = [
            line
            for line in record["lines"]
            if line["control"] in ("", "no defense")
            and line["detector"] == "none"
            and line["attack"].startswith(of.get("attack", ""))
            and line["defense"].split(" ")[0] == defense
        ]
        least = min(own, key=lambda line: (line["success"]["rate"], -line["clean_accuracy"]["mean"]))
        words = f"{proportion(least['success'])}; accuracy {percent(least['clean_accuracy']['mean'])}"
        parts.append(f"undefended: {words}" if parts else words)
    return "; ".join(parts)


def before_and_after(record: Record, of: Mapping[str, Any]) -> str:
    """A `rate` before and after retraining without what a `detector` flagged; accuracy beside the control."""
    before, after, clean = (
        told(line_of(record, **place)[of["rate"]])
        for place in ({"control": "no defense"}, {"detector": of["detector"]}, {"control": "no attack"})
    )
    return f"{before} → {after}" + (f"; never poisoned: {clean}" if of["rate"] == "clean_accuracy" else "")


def spent(record: Record, detector: str) -> str:
    """Seconds to train, to find and to heal."""
    taken = line_of(record, detector=detector)["costs"]["seconds"]
    stages = (("train", "train"), ("find", "trace"), ("heal", "heal"))
    return ", ".join(f"{word} {seconds(taken[stage])}" for stage, word in stages)


def hits(record: Record, budget: float) -> str:
    """MetaPoison's success at a budget, those of the other attacks, and the clean control."""
    successes, wanted = {}, (budget, "same")
    for row in record["rows"]:
        if (row["budget"], row["victim"]) == wanted:
            successes[row["attack"]] = proportion(row["success"], interval=row["attack"] == "metapoison")
    for row in record.get("ahead", ()):
        if (row["budget"], row["victim"]) == wanted and row["interval"]:
            points = [f"{100 * one:.0f}" for one in (row["difference"], *row["interval"])]
            successes[row["of"]] += ", MetaPoison ahead by {} points ({} to {})".format(*points)
    parts = [
        successes.pop("metapoison"),
        *(f"{key.replace('-', ' ')}: {one}" for key, one in successes.items()),
    ]
    clean = next(row["success"] for row in record["control"] if row["victim"] == "same")
    return "; ".join((*parts, f"clean control: {clean['successes']} of {clean['trials']}"))


def transferred(record: Record, knowledge: str) -> str:
    """Success of the feature-space attacks, with the fitted layer and the layer as published."""
    parts = []
    for layer in ("not augmented, fitted", "as published"):
        successes = {
            row["attack"]: row["success"]
            for row in record["rows"]
            if (row["knowledge"], row["layer"]) == (knowledge, layer)
        }
        shares = ", ".join(percent(successes[name]["rate"]) for name in POLYTOPES if name in successes)
        parts += [f"{shares} (n = {successes[POLYTOPES[-1]]['trials']}, layer {layer})"] if shares else []
    return "; ".join(parts)


def healing(record: Record, of: Mapping[str, Any]) -> str:
    """A `rate` of the demo before and after healing, and where `control` is true of a clean network."""
    before, after, clean = (
        proportion(record["rates"][f"{of['rate']}, {when}"], interval=False)
        for when in ("poisoned", "healed", "never poisoned")
    )
    return f"{before} → {after}" + (f"; never poisoned: {clean}" if of.get("control") else "")


VALUES: Final[Mapping[str, Callable[[Record, Any], str]]] = {
    "against": lambda record, what: against(what)(record),
    "seconds": lambda record, what: seconds(record["seconds"][what]),
    "proportion": lambda record, name: proportion(record["rates"][name], interval=False),
    "interval": lambda record, name: proportion(record["rates"][name]),
    "healing": healing,
    "rate": rate,
    "found": found,
    "flagged": flagged,
    "seen": seen,
    "success": success,
    "under": under,
    "healed": healed,
    "ranking": ranking,
    "retrained": retrained,
    "defended": defended,
    "before and after": before_and_after,
    "recall": lambda record, detector: share(line_of(record, detector=detector), "true_positives"),
    "precision": lambda record, detector: share(line_of(record, detector=detector), "precision"),
    "spent": spent,
    "hits": hits,
    "transferred": transferred,
}
