"""The table of a leaderboard: a row for each combination of methods, as cells and as text for papers.

Every number stands beside its n.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

from unpoison._statistics import Proportion
from unpoison.evaluation import Line, Mean
from unpoison.report._figures import interval_text, percent


@final
@dataclass(frozen=True)
class Cell:
    """One cell of the table.

    Arguments:
        text: the number.
        note: its n and interval, parts separated by semicolons.
        value: what the column is sorted by; None sorts last.
    """

    text: str
    note: str = ""
    value: float | str | None = None


@final
@dataclass(frozen=True)
class Column:
    """A column of the table: its heading, what it means, and the group that it belongs to."""

    name: str
    group: str
    meaning: str


@final
@dataclass(frozen=True)
class Table:
    """The leaderboard as text: columns, and rows with a cell for each of them."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def select(self, *names: str) -> Table:
        """The table with the columns of these names alone, in their order."""
        known = [column.name for column in self.columns]
        return self._with([known.index(name) for name in names])

    def without_empty(self) -> Table:
        """The table without the columns in which no row has a value."""
        return self._with(
            [
                place
                for place in range(len(self.columns))
                if not self.rows or any(row[place] != _NONE for row in self.rows)
            ]
        )

    def _with(self, places: Sequence[int]) -> Table:
        return Table(
            tuple(self.columns[place] for place in places),
            tuple(tuple(row[place] for place in places) for row in self.rows),
        )


_NONE = Cell("–")
_METHOD, _OUTCOME, _SEARCH, _COST = "", "Outcome", "Excluded examples", "Cost"
_SCREENED = "Screened inputs"

COLUMNS = (
    Column("Method", _METHOD, "the defense, or the detector and the unlearner, or the control"),
    Column("Attack", _METHOD, "with its budget, as a share of the training set or a count"),
    Column(
        "Attack success",
        _OUTCOME,
        "share of the adversary's test inputs that get the label that the attack wants; for attacks on more "
        "than one input the mean over trials, beside the trials in which most inputs do",
    ),
    Column("Clean accuracy", _OUTCOME, "on clean test images"),
    Column("Worst class", _OUTCOME, "the lowest accuracy of a class, all trials together"),
    Column(
        "Certified",
        _OUTCOME,
        "share of the test images that are predicted rightly whatever training example is inserted, removed "
        "or labelled otherwise; beside it the share under five such changes",
    ),
    Column(
        "Noise score",
        _OUTCOME,
        "Gaussian Unlearning Score, mean over trials: 0 where the noise is forgotten; beside it the noisy "
        "images that are still remembered, 1 % of which are by chance",
    ),
    Column("Traced", _SEARCH, "trials with a wrong prediction to trace; there is none where an attack fails"),
    Column("Poison found", _SEARCH, "trials in which the detector says that there is poison"),
    Column("Recall", _SEARCH, "share of the poisoned examples that are excluded, all trials together"),
    Column("Precision", _SEARCH, "share of the excluded examples that are poison"),
    Column("False positives", _SEARCH, "share of the clean examples that are excluded"),
    Column(
        "Average precision",
        _SEARCH,
        "area under the precision-recall curve of the scores, traced trials alone",
    ),
    Column("Filter bias", _SEARCH, "largest difference between two classes in the share of false positives"),
    Column(
        "Repaired", _SEARCH, "repairs that ended with the answer gone and a last trace that found nothing"
    ),
    Column(
        "Rounds",
        _SEARCH,
        "how often a repair healed, mean over trials; beside it the repairs whose last trace found nothing",
    ),
    Column(
        "TPR at 1 % FPR",
        _SCREENED,
        "share of the triggered inputs that are answered as the attack wants and flagged at the stated "
        "false-positive rate",
    ),
    Column("FPR at 1 % FPR", _SCREENED, "share of the clean test images flagged at it"),
    Column("TPR at 5 % FPR", _SCREENED, "likewise, at .05"),
    Column("FPR at 5 % FPR", _SCREENED, "likewise"),
    Column("AUROC", _SCREENED, "of triggered against clean inputs, mean over trials"),
    Column("Training", _COST, "of the victim, mean over trials; beside it the ratio to no defense"),
    Column("Search and healing", _COST, "mean over trials; beside it each stage"),
    Column("Peak memory", _COST, "of the stage that needed most"),
    Column("Trials", _COST, "how many"),
)


def table_of(lines: Sequence[Line]) -> Table:
    """The leaderboard's table. The time of training is given where there are defenses to compare."""
    compared = any(line.defense != "none" for line in lines)
    undefended = {
        (line.attack, line.budget, line.victim): line.seconds.get("train")
        for line in lines
        if compared and line.control == "no defense"
    }

    def training(line: Line) -> Cell:
        usual = undefended.get((line.attack, line.budget, line.victim))
        return _training(line, usual) if compared else _NONE

    return Table(COLUMNS, tuple(tuple(_cells(line, training(line))) for line in lines))


def _training(line: Line, undefended: float | None) -> Cell:
    seconds = line.seconds.get("train")
    if seconds is None:
        return _NONE
    ratio = f"{seconds / undefended:.2f}x; " if undefended else ""
    return Cell(f"{seconds:.3g} s", f"{ratio}n = {line.n}", seconds)


def method_name(line: Line) -> str:
    """The defense, or the detector and the unlearner, or the control; the unlearner with what it was told."""
    if line.control in ("no attack", "no defense"):
        return line.control
    if line.defense != "none":
        return line.defense
    if line.control.endswith(" found"):
        return f"{line.unlearner}, {line.control}"
    if line.detector == "none":
        return line.unlearner
    detector = line.detector if line.control != "perfect filter" else "perfect filter"
    name = detector if line.unlearner == "none" else f"{detector} → {line.unlearner}"
    return name if line.control in ("", "random filter", "perfect filter") else f"{name}, {line.control}"


def attack_name(line: Line) -> str:
    """The attack and its budget, and the kind of victim where it has a name."""
    budget = f"{100 * line.budget:g} %" if line.budget <= 1 else f"{line.budget:g} examples"
    victim = "" if line.victim == "default" else f"; {line.victim}"
    return f"{line.attack}, {budget}{victim}" if line.budget else f"{line.attack}{victim}"


def _cells(line: Line, training: Cell) -> Iterator[Cell]:
    for name in (method_name(line), attack_name(line)):
        yield Cell(name, "", name)
    yield _success(line)
    yield _mean(line.clean_accuracy)
    worst, proportion = line.worst_class
    cell = _proportion(proportion)
    yield Cell(cell.text, f"{worst}, {cell.note}", cell.value) if cell.note else _NONE
    yield _certified(line)
    yield _noise(line)
    traced = line.observed
    yield Cell(f"{traced.successes} of {traced.trials}", "", traced.successes) if traced.trials else _NONE
    yield _proportion(line.found)
    yield from map(_proportion, _excluded(line))
    yield _mean(line.average_precision, share=False)
    bias = line.filter_bias
    yield _NONE if bias is None else Cell(percent(bias), f"n = {line.n}", bias)
    yield _proportion(line.repaired)
    yield _rounds(line)
    for one in (
        line.screened_true_01,
        line.screened_false_01,
        line.screened_true_05,
        line.screened_false_05,
    ):
        yield _proportion(one)
    yield _mean(line.screened_auroc, share=False)
    yield training
    stages = {name: line.seconds[name] for name in ("find", "screen", "heal") if name in line.seconds}
    parts = ", ".join(f"{name} {seconds:.3g}" for name, seconds in stages.items())
    total = sum(stages.values())
    yield Cell(f"{total:.3g} s", f"{parts}; n = {line.n}", total) if stages else _NONE
    peak = line.peak_bytes
    yield Cell(f"{peak / 1e6:,.0f} MB", f"n = {line.n}", peak) if peak else _NONE
    yield Cell(str(line.n), "", line.n)


def _certified(line: Line) -> Cell:
    """Certified accuracy under one change; the curve ends where it is 0."""
    if not line.certified:
        return _NONE
    none = Proportion(0, line.certified[0].trials)
    one, five = (line.certified[most] if most < len(line.certified) else none for most in (1, 5))
    cell = _proportion(one)
    return Cell(cell.text, f"{cell.note}; {percent(five.rate)} under 5", cell.value)


def _noise(line: Line) -> Cell:
    if not line.noise_score.n:
        return _NONE
    cell, remembered = _mean(line.noise_score, share=False), line.noise_remembered
    note = f"{remembered.successes} of {remembered.trials} remembered"
    return Cell(cell.text, f"{cell.note}; {note}", cell.value)


def _rounds(line: Line) -> Cell:
    if not line.rounds.n:
        return _NONE
    empty = line.last_trace_empty
    note = f"{empty.successes} of {empty.trials} end with an empty trace"
    return Cell(f"{line.rounds.mean:.2f}", note, line.rounds.mean)


def _excluded(line: Line) -> tuple[Proportion, Proportion, Proportion]:
    """Recall, precision, false positives of what was flagged, removed in rounds, or dropped by a defense."""
    if line.repaired.trials:
        removed = line.removed_precision
        clean = Proportion(removed.trials - removed.successes, line.false_positives.trials)
        return line.removed_recall, removed, clean
    if not line.dropped.trials:
        return line.true_positives, line.precision, line.false_positives
    poison, dropped = line.drop_recall, line.dropped
    false_positives = Proportion(dropped.successes - poison.successes, dropped.trials - poison.trials)
    return poison, line.drop_precision, false_positives


def single_inputs(line: Line) -> bool:
    """Whether each trial's attack is on one input, so that the rates of inputs and of trials are the same."""
    return all(row["attack_total"] == 1 for row in line.rows)


def _success(line: Line) -> Cell:
    """One rate: of the trials where each has one input, else of the inputs, beside the count of trials."""
    if not line.success.trials or single_inputs(line):
        return _proportion(line.success)
    rate, trials = _mean(line.success_rate), _proportion(line.success)
    return rate if trials == _NONE else Cell(rate.text, trials.note.replace(";", " trials;"), rate.value)


def _proportion(proportion: Proportion) -> Cell:
    if not proportion.trials:
        return _NONE
    note = f"{proportion.successes:,} of {proportion.trials:,}; {interval_text(proportion)}"
    return Cell(percent(proportion.rate), note, proportion.rate)


def _mean(mean: Mean, *, share: bool = True) -> Cell:
    if not mean.n:
        return _NONE
    factor, unit = (100.0, " %") if share else (1.0, "")
    digits = 1 if share else 3
    spread = "" if math.isnan(mean.deviation) else f" ± {factor * mean.deviation:.{digits}f}"
    return Cell(f"{factor * mean.mean:.{digits}f}{spread}{unit}", f"n = {mean.n}", mean.mean)
