"""The leaderboard: the results of a recipe as a page and as tables for papers.

`leaderboard_html` is one self-contained page: a table that a click on a heading sorts, a plot of attack
success against accuracy, growth with the budget where the recipe has several, paired comparisons, and every
trial; each cell of the table links to the trials that it was computed from. The page loads nothing: its
policy allows its one style sheet and its one script, both named by hash. `leaderboard_markdown` and
`leaderboard_latex` give the same table as text. Every number stands beside its n.

The same results give the same bytes. Reading 10,000 trials and writing the page takes a few seconds.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from pathlib import Path
from typing import Any, final

from markupsafe import Markup

from unpoison._artefacts import atomic_file
from unpoison._statistics import Proportion
from unpoison.evaluation import Comparison, Line, Mean, Results, compare, leaderboard
from unpoison.report._figures import percent
from unpoison.report._svg import Canvas, Scale, coordinate, plain
from unpoison.report._templates import environment, policy, resource

_MOST_COMPARISONS = 200


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
    """The defense, or the detector and the unlearner, or the control."""
    if line.control in ("no attack", "no defense"):
        return line.control
    if line.defense != "none":
        return line.defense
    detector = line.detector if line.control != "perfect filter" else "perfect filter"
    return detector if line.unlearner == "none" else f"{detector} → {line.unlearner}"


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
    traced = line.observed
    yield Cell(f"{traced.successes} of {traced.trials}", "", traced.successes) if traced.trials else _NONE
    yield _proportion(line.found)
    yield from map(_proportion, _excluded(line))
    yield _mean(line.average_precision, share=False)
    bias = line.filter_bias
    yield _NONE if bias is None else Cell(percent(bias), f"n = {line.n}", bias)
    yield training
    stages = {name: line.seconds[name] for name in ("find", "heal") if name in line.seconds}
    parts = ", ".join(f"{name} {seconds:.3g}" for name, seconds in stages.items())
    total = sum(stages.values())
    yield Cell(f"{total:.3g} s", f"{parts}; n = {line.n}", total) if stages else _NONE
    peak = line.peak_bytes
    yield Cell(f"{peak / 1e6:,.0f} MB", f"n = {line.n}", peak) if peak else _NONE
    yield Cell(str(line.n), "", line.n)


def _excluded(line: Line) -> tuple[Proportion, Proportion, Proportion]:
    """Recall, precision and false positives of the flags of a detector or of the drops of a defense."""
    if not line.dropped.trials:
        return line.true_positives, line.precision, line.false_positives
    poison, dropped = line.drop_recall, line.dropped
    false_positives = Proportion(dropped.successes - poison.successes, dropped.trials - poison.trials)
    return poison, line.drop_precision, false_positives


def _single_inputs(line: Line) -> bool:
    """Whether each trial's attack is on one input, so that the rates of inputs and of trials are the same."""
    return all(row["attack_total"] == 1 for row in line.rows)


def _success(line: Line) -> Cell:
    """One rate: of the trials where each has one input, else of the inputs, beside the count of trials."""
    if not line.success.trials or _single_inputs(line):
        return _proportion(line.success)
    rate, trials = _mean(line.success_rate), _proportion(line.success)
    return rate if trials == _NONE else Cell(rate.text, trials.note.replace(";", " trials;"), rate.value)


def _proportion(proportion: Proportion) -> Cell:
    if not proportion.trials:
        return _NONE
    low, high = (f"{100 * bound:.1f}" for bound in proportion.interval())
    note = f"{proportion.successes:,} of {proportion.trials:,}; {low}–{high} %"
    return Cell(percent(proportion.rate), note, proportion.rate)


def _mean(mean: Mean, *, share: bool = True) -> Cell:
    if not mean.n:
        return _NONE
    factor, unit = (100.0, " %") if share else (1.0, "")
    digits = 1 if share else 3
    spread = "" if math.isnan(mean.deviation) else f" ± {factor * mean.deviation:.{digits}f}"
    return Cell(f"{factor * mean.mean:.{digits}f}{spread}{unit}", f"n = {mean.n}", mean.mean)


def leaderboard_markdown(results: Results) -> str:
    """The table as Markdown, without empty columns."""
    table = table_of(leaderboard(results)).without_empty()
    lines = [
        "| " + " | ".join(_markdown(column.name) for column in table.columns) + " |",
        "|" + "---|" * len(table.columns),
    ]
    for row in table.rows:
        cells = (_markdown(cell.text + (f" ({cell.note})" if cell.note else "")) for cell in row)
        lines.append("| " + " | ".join(cells) + " |")
    meanings = [f"- {column.name}: {column.meaning}." for column in table.columns if column.group]
    return "\n".join([*lines, "", *meanings, ""])


def leaderboard_latex(results: Results) -> str:
    """The table as LaTeX, for the package booktabs, without empty columns."""
    table = table_of(leaderboard(results)).without_empty()
    body = [
        " & ".join(_latex(cell.text + (f" ({cell.note})" if cell.note else "")) for cell in row) + r" \\"
        for row in table.rows
    ]
    return "\n".join(
        [
            f"% {plain(results.name)}: {len(results.table)} of {results.planned} trials",
            r"\begin{tabular}{ll" + "r" * (len(table.columns) - 2) + "}",
            r"\toprule",
            " & ".join(_latex(column.name) for column in table.columns) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def _markdown(text: str) -> str:
    return plain(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


_LATEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "→": r"$\to$",
    "–": "--",
    "<": "$<$",
    ">": "$>$",
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in plain(text))


def leaderboard_html(results: Results) -> str:
    """The leaderboard as one HTML page."""
    lines = leaderboard(results)
    style = resource("page.css") + resource("leaderboard.css")
    script = resource("leaderboard.js")
    table = table_of(lines).without_empty()
    return (
        environment()
        .get_template("leaderboard.html.j2")
        .render(
            results=results,
            description=plain(results.experiment.get("description", "")),
            style=Markup(style),
            script=Markup(script),
            policy=policy(style, script),
            columns=table.columns,
            groups=_groups(table.columns),
            rows=[(bool(line.control), row) for line, row in zip(lines, table.rows, strict=True)],
            plot=_plot(lines) if any(line.success.trials for line in lines) else None,
            growth=_growth(lines),
            comparisons=list(_comparisons(lines)),
            single=all(map(_single_inputs, lines)),
            trials=[
                (method_name(line), attack_name(line), _classes(line), _stages(line), _trials(line))
                for line in lines
            ],
        )
    )


def write_leaderboard(path: str | os.PathLike[str], results: Results) -> None:
    """Write the leaderboard to a file, whole or not at all; its suffix (.html, .md, .tex) says how."""
    made = {".md": leaderboard_markdown, ".tex": leaderboard_latex}.get(
        Path(path).suffix.lower(), leaderboard_html
    )
    text = made(results)
    with atomic_file(path) as staging:
        staging.write_text(text, encoding="utf-8", newline="\n")


def _groups(columns: Sequence[Column]) -> list[tuple[str, int]]:
    """The groups of the columns, each with the number of its columns."""
    return [(name, len(list(members))) for name, members in groupby(columns, lambda column: column.group)]


def _stages(line: Line) -> str:
    return ", ".join(f"{name} {seconds:.3g} s" for name, seconds in line.seconds.items())


def _classes(line: Line) -> str:
    return "; ".join(
        f"{name} {percent(share.rate)} of {share.trials:,}" for name, share in line.per_class.items()
    )


def _trials(line: Line) -> list[dict[str, Any]]:
    return [
        {
            "subject": f"{row['source']} → {row['target']}"
            + (f" (test {', '.join(map(str, row['test_indices']))})" if row["test_indices"] else ""),
            "seed": row["seed"],
            "success": f"{row['attack_successes']} of {row['attack_total']}" if row["attack_total"] else "–",
            "accuracy": f"{row['clean_correct']} of {row['clean_total']}",
            "recall": "–" if row["flagged"] is None else f"{row['true_positives']} of {row['poisons']}",
            "flagged": "–" if row["flagged"] is None else row["flagged"],
            "key": row["key"],
        }
        for row in line.rows
    ]


def _plot(lines: Sequence[Line]) -> Markup:
    """Attack success against clean accuracy; the best methods are in the lower right corner."""
    canvas = Canvas(
        640,
        400,
        "Attack success rate against clean accuracy",
        "Each number is a row of the table; its whiskers are the standard deviations over trials.",
        "plot",
    )
    numbered = [(place, line) for place, line in enumerate(lines, 1) if line.success.trials]
    accuracies = [100 * line.clean_accuracy.mean for _, line in numbered]
    lowest, highest = min(accuracies), max(accuracies)
    pad = max(1.0, 0.08 * (highest - lowest))
    x = Scale(max(0.0, lowest - pad), min(100.0, highest + pad), 48.0, 620.0)
    y = Scale(0.0, 100.0, 340.0, 30.0)
    canvas.y_axis(y, 48.0, "attack success rate, %", right=620.0)
    canvas.x_axis(x, 340.0, "clean accuracy", percent=True)
    for _, line in numbered:
        at_x, at_y = x.at(100 * line.clean_accuracy.mean), y.at(100 * line.success_rate.mean)
        for mean, scale, across in ((line.clean_accuracy, x, True), (line.success_rate, y, False)):
            if mean.n > 1:
                low, high = (scale.at(100 * (mean.mean + sign * mean.deviation)) for sign in (-1, 1))
                path = (
                    f"M{coordinate(low)} {coordinate(at_y)}H{coordinate(high)}"
                    if across
                    else f"M{coordinate(at_x)} {coordinate(low)}V{coordinate(high)}"
                )
                canvas.add("path", class_="spread", d=path)
    labels: dict[tuple[int, int], list[str]] = defaultdict(list)
    for place, line in numbered:
        at_x, at_y = x.at(100 * line.clean_accuracy.mean), y.at(100 * line.success_rate.mean)
        kind = "point control" if line.control else "point"
        canvas.add("circle", class_=kind, cx=at_x, cy=at_y, r=3.5)
        labels[12 * round(at_x / 12), 12 * round(at_y / 12)].append(str(place))
    for (at_x, at_y), places in labels.items():  # points that lie close together have one label
        canvas.text(at_x + 5, at_y - 5, plain(", ".join(places), limit=24), "note halo")
    return canvas.render()


def _growth(lines: Sequence[Line]) -> Markup | None:
    """Attack success against the budget, a line for each method with several budgets; None if none has."""
    methods: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        methods.setdefault((line.attack, method_name(line)), []).append(line)
    several = {key: found for key, found in methods.items() if len({one.budget for one in found}) > 1}
    if not several:
        return None
    shown = list(several.items())[:12]
    canvas = Canvas(
        640, 400, "Growth with the budget", "Attack success rate of each method at each budget.", "growth"
    )
    budgets = sorted({line.budget for _, found in shown for line in found})
    x = Scale(0.0, 1.05 * budgets[-1], 48.0, 400.0)
    y = Scale(0.0, 100.0, 340.0, 30.0)
    canvas.y_axis(y, 48.0, "attack success rate, %", right=400.0)
    label = "budget, share of the training set" if budgets[-1] <= 1 else "budget, examples"
    canvas.x_axis(x, 340.0, label, wanted=4)
    ends = []
    for (attack, name), found in shown:
        points = [
            (x.at(line.budget), y.at(100 * line.success_rate.mean))
            for line in sorted(found, key=lambda one: one.budget)
        ]
        canvas.add(
            "path",
            class_="pale-line",
            d="M" + "L".join(f"{coordinate(a)} {coordinate(b)}" for a, b in points),
        )
        for a, b in points:
            canvas.add("circle", class_="point", cx=a, cy=b, r=3.0)
        ends.append((points[-1][1], f"{name} ({attack}, n = {min(one.n for one in found)})"))
    at = 0.0
    for height, words in sorted(ends):  # names stand right of the plot and must not overlap
        at = max(at + 16, height + 4)
        canvas.text(410.0, min(at, 392.0), plain(words, limit=44), "tick")
    return canvas.render()


def _comparisons(lines: Sequence[Line]) -> Iterator[tuple[str, str, str, Comparison]]:
    """Each method with no defense, and methods with each other, on the same attack and budget."""
    count = 0
    for first, second in combinations(lines, 2):
        if (first.attack, first.budget, first.victim) != (second.attack, second.budget, second.victim):
            continue
        if first.control == "no defense":
            first, second = second, first
        if first.control and (second.control != "no defense" or first.control == "no attack"):
            continue
        if second.control not in ("", "no defense"):
            continue
        if count == _MOST_COMPARISONS:
            return
        count += 1
        yield method_name(first), method_name(second), attack_name(first), compare(first, second)
