"""The table of docs/which_method.md: for each situation a method, what was measured of it, and what was not.

What was measured is read from the stored results, and what a method costs from its registry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, final

from benchmarks._recipe_tables import CALIBRATED, FILTER, defended, line_of, share, told
from benchmarks._study_tables import hits
from benchmarks._tables import NOT_MEASURED, Record, proportion, rate, table
from unpoison import attacks, defenses, detectors, input_detectors, unlearners

Results = Mapping[str, Record]
PAGE: Final = "docs/which_method.md"
BEGIN, END = "<!-- situations -->", "<!-- /situations -->"


@final
@dataclass(frozen=True)
class Part:
    """What one stored result says: its name, and how its value reads in a sentence."""

    result: str
    value: Callable[[Record], str]

    def of(self, results: Results) -> str:
        """The value; "" where the result or the method in it is missing."""
        try:
            return self.value(results[self.result])
        except (KeyError, StopIteration, ValueError):
            return ""


@final
@dataclass(frozen=True)
class Situation:
    """A row: the situation, what to take, the parts of what was measured, its cost, and what is not known."""

    what: str
    take: str
    parts: tuple[Part, ...]
    cost: str
    unknown: str

    def cells(self, results: Results) -> list[str]:
        """The cells of the row."""
        measured = "; ".join(filter(None, (part.of(results) for part in self.parts)))
        return [self.what, self.take, measured or NOT_MEASURED, self.cost, self.unknown]


def rates(result: str, names: Mapping[str, str]) -> tuple[Part, ...]:
    """Rates of a result by name, each after its words; what had no trial is left out."""

    def of(name: str, words: str) -> Part:
        def value(record: Record) -> str:
            return f"{words} {rate(name)(record)}" if record["rates"][name]["trials"] else ""

        return Part(result, value)

    return tuple(of(name, words) for name, words in names.items())


def found_by(result: str, words: str, **line: str) -> Part:
    """Poison that a detector flagged, how many it flagged, and success after retraining without them."""

    def value(record: Record) -> str:
        chosen = line_of(record, control="", **line)
        flagged, left = chosen["precision"]["trials"], told(chosen["success_rate"])
        return (
            f"{words} {share(chosen, 'true_positives')} of the poison among {flagged:,} flagged, "
            f"success {left} after retraining without them"
        )

    return Part(result, value)


def verdicts(result: str, words: str, attack: str) -> Part:
    """How many attacks were found."""

    def value(record: Record) -> str:
        line = line_of(record, detector=CALIBRATED, control="", attack=attack)
        return f"{words} {proportion(line['found'], interval=False)}"

    return Part(result, value)


def healed(name: str, words: str) -> Part:
    """Success and accuracy after an unlearner, and its time beside retraining."""

    def value(record: Record) -> str:
        success, kept = (
            proportion(record["rates"][f"{name}: {what}"], interval=False)
            for what in ("attack success", "clean accuracy")
        )
        retrain = f"{name.partition(',')[0]}, retrain"
        times = record["seconds"][name] / record["seconds"][retrain]
        beside = "" if name == retrain else f", {times:.2f} of the time of retraining"
        return f"{words} success {success}, accuracy {kept}{beside}"

    return Part("unlearning", value)


def situations(results: Results) -> str:
    """The table."""
    header = ("situation", "take", "measured", "cost", "not measured")
    return table(header, [one.cells(results) for one in SITUATIONS])


_UNDEFENDED: Final = "success undefended:"
SITUATIONS: Final = (
    Situation(
        "one wrong answer; a trigger, wrong labels; labelled held-out data",
        "`trace` by `calibrated`, with `reference=`",
        (
            *rates("verdict", {"found": "attacks found at level .01:"}),
            verdicts("delta-influence-held-out", "held out, BadNets:", "badnets"),
            verdicts("delta-influence-held-out", "held out, smooth trigger:", "smooth-trigger"),
            *rates(
                "verdict",
                {
                    "recall of those found": "of their poison, flagged:",
                    "precision": "of the flagged, poison:",
                    "false_alarms_01": "ordinary errors called poisoned:",
                },
            ),
        ),
        detectors.describe(CALIBRATED).cost,
        "images larger than 32 pixels; networks of full size; a GPU",
    ),
    Situation(
        "the same, with a small budget",
        "`trace` by `calibrated`",
        rates("verdict", {f"found, {share} %": f"{share} % of the set:" for share in ("0.2", "0.5", "1")}),
        "the same",
        "attacks whose trigger works on fewer than half of the inputs; less than 0.2 %",
    ),
    Situation(
        "one wrong answer; labels are right, images were optimised (gradient matching)",
        "`trace` by `calibrated`, which falls back to `artifact-mixture`; `delta-influence`, preset "
        "`published-matching`",
        (
            verdicts("delta-influence-matching-held-out", "held out, found:", "gradient-matching"),
            found_by("detectors-matching", "`calibrated`:", detector=CALIBRATED),
            found_by(
                "detectors-matching", "`delta-influence`:", detector="delta-influence (published-matching)"
            ),
        ),
        detectors.describe("delta-influence").cost,
        "MetaPoison; poison without noise",
    ),
    Situation(
        "one wrong answer; no labelled held-out data",
        "`trace` by `calibrated` all the same",
        (),
        detectors.describe(CALIBRATED).cost,
        "its false alarms: the training set stands in, and the level hardly holds",
    ),
    Situation(
        "many wrong answers of one model, or a set that is large",
        "`index` once, then `trace(index=...)`",
        rates("index", {"verdicts, 2048": "same verdict as without an index, 2,048 numbers an example:"}),
        "one pass over the training set, kept on disk",
        "sets beyond those of [the index](influence_index.md)",
    ),
    Situation(
        "no wrong answer; labels may be wrong",
        "look at what `activation-clustering` flags; remove nothing unseen",
        (
            found_by(
                "detectors-sample",
                "`activation-clustering` on BadNets:",
                attack="badnets",
                detector="activation-clustering (original)",
            ),
            found_by("detectors-sample", "`deep-knn`:", attack="badnets", detector="deep-knn (original)"),
            found_by(
                "detectors-sample",
                "`statistical-contamination`, which can find nothing:",
                attack="badnets",
                detector="statistical-contamination (original)",
            ),
        ),
        detectors.describe("activation-clustering").cost,
        "more poison than 1.5 %, for which these were made; larger networks",
    ),
    Situation(
        "no wrong answer; labels are right, images were optimised with noise",
        "`scan` by `frequency`",
        (
            found_by("delta-influence-matching-held-out", "held out:", detector="frequency (quick)"),
            found_by(
                "detectors-sample",
                "on BadNets, for which it is not:",
                attack="badnets",
                detector="frequency (quick)",
            ),
        ),
        detectors.describe("frequency").cost,
        "poison of small eps, or of colour and smooth patterns",
    ),
    Situation(
        "no wrong answer, and no training set: inputs of a model in use may bear a trigger",
        "`screen`, then `trace` what it flags",
        (),
        input_detectors.describe("strip").cost,
        "how many triggers it flags; its false-positive rate holds by construction, for inputs like those "
        "held out",
    ),
    Situation(
        "before training; labels are right, images may be optimised",
        "train with `recompression-filter`",
        (
            Part(
                "matching-held-out", lambda record: f"held out, success: {defended(FILTER, 'none')(record)}"
            ),
            Part("matching-cifar10", lambda record: f"EPIC at its best: {defended('epic')(record)}"),
        ),
        defenses.describe(FILTER).cost,
        "an adversary who crafts through JPEG; images above 32 pixels; MetaPoison",
    ),
    Situation(
        "before training; labels may be wrong",
        "try `epic` and its controls on your data, as in [a notebook](notebooks/compare_defenses.md); then "
        "`trace` what goes wrong",
        (),
        defenses.describe("epic").cost,
        "rates of any defense on a trigger with wrong labels; the notebook has one victim each",
    ),
    Situation(
        "poison was found, nearly all of it; time matters",
        "`heal` by `relabel`",
        (healed("exact, relabel (ours)", "`relabel`:"), healed("exact, retrain", "`retrain`:")),
        unlearners.describe("relabel").cost,
        "large networks; poison whose labels are right",
    ),
    Situation(
        "poison was found, perhaps a part of it",
        "`repair`, which traces the healed model again",
        (
            *rates("verdict", {"healed": "healed:"}),
            healed("half, retrain", "half of the poison removed, by one `retrain`:"),
            healed("half, potion", "by `potion`:"),
        ),
        "a trace and a healing each round",
        "repair on photographs",
    ),
    Situation(
        "you attack your own pipeline; wrong labels allowed",
        "`craft badnets`, or `blended`, `smooth-trigger`",
        rates("triggers", {f"{name}: attack success": f"`{name}`:" for name in ("badnets", "blended")}),
        attacks.describe("badnets").cost,
        "training at full size",
    ),
    Situation(
        "you attack your own pipeline; labels must stay right",
        "`gradient-matching` against fine-tuning; `metapoison` from scratch",
        (
            Part(
                "matching-cifar10",
                lambda record: f"gradient matching, {_UNDEFENDED} {defended('none')(record)}",
            ),
            Part(
                "metapoison_success_from_scratch_ten",
                lambda record: f"MetaPoison from scratch, 2 %: {hits(0.02)(record)}",
            ),
        ),
        attacks.describe("metapoison").cost,
        "training at full size; [the ledger](results/ledger.md) says which numbers are of version 0.1",
    ),
    Situation(
        "the inputs are texts, vectors or volumes",
        "`trace` by `calibrated`; scans but `frequency`",
        rates(
            "compatibility",
            {
                "kinds of dataset as wanted": "kinds of dataset that work or are refused in a line:",
                "kinds of network as wanted": "kinds of network:",
            },
        ),
        detectors.describe(CALIBRATED).cost,
        "how often poison in anything but images is found",
    ),
)
