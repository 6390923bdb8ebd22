"""The leaderboard: what a recipe gave, as a page for people and as tables for papers.

`leaderboard_html` is one self-contained page: a table that sorts itself when a heading is clicked, success
against accuracy, growth with the budget where the recipe has several, paired comparisons, and every trial;
each cell of the table leads to the trials that it was made from. The page asks nobody for anything: its
policy allows its one style sheet and its one script, both named by hash. `leaderboard_markdown` and
`leaderboard_latex` give the same table as text. Every number stands beside its n.

The same results give the same bytes. Reading 10,000 trials and writing the page takes a few seconds.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, final

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from unpoison._artefacts import atomic_file
from unpoison._statistics import Proportion
from unpoison.evaluation import Comparison, Line, Mean, Results, compare, leaderboard
from unpoison.report._figures import percent
from unpoison.report._page import _resource
from unpoison.report._svg import Canvas, Scale, coordinate, plain

_MOST_COMPARISONS = 200


@final
@dataclass(frozen=True)
class Cell:
    """What a table says in one place.

    Arguments:
        text: the number.
        note: what it rests on: n, the interval.
        value: what a column is sorted by; None sorts last.
    """

    text: str
    note: str = ""
    value: float | str | None = None


@final
@dataclass(frozen=True)
class Table:
    """The leaderboard as text: headings with what they mean, and a row of cells a line."""

    headings: tuple[tuple[str, str], ...]
    rows: tuple[tuple[Cell, ...], ...]


_NONE = Cell("–")

HEADINGS = (
    ("Method", "who defended, or who traced and who healed, or which control it is"),
    ("Attack", "with its budget, as a share of the training set or a count"),
    ("Attack success", "trials in which most of the adversary's inputs are answered as they want"),
    ("Success rate", "share of the adversary's test inputs that are answered as they want"),
    ("Clean accuracy", "share of clean test images answered rightly"),
    ("Worst class", "the lowest accuracy of a class, all trials together"),
    ("Traced", "trials with a wrong answer to trace; where the attack failed there is none"),
    ("Caught", "poisoned examples flagged, all trials together (recall)"),
    ("Precision", "flagged examples that are poison"),
    ("Clean lost", "clean examples flagged"),
    ("Average precision", "area under the precision-recall curve of the scores; of the traced trials"),
    ("Filter bias", "largest difference between two classes in the share of clean examples lost"),
    ("Dropped", "training examples that the defense no longer used in the last epoch"),
    ("Drop precision", "dropped examples that are poison"),
    ("Drop recall", "poisoned examples that were dropped"),
    ("Training", "seconds of the victim's training, mean of the trials; beside it the ratio to no defense"),
    ("Seconds", "finding and healing, mean of the trials; beside it each stage"),
    ("Peak memory", "of the stage that needed most"),
    ("Trials", "how many"),
)


def table_of(lines: Sequence[Line]) -> Table:
    """The leaderboard's table. What training took stands in it where there are defenses to compare."""
    compared = any(line.defense != "none" for line in lines)
    plain = {
        (line.attack, line.budget): line.seconds.get("train")
        for line in lines
        if compared and line.control == "no defense"
    }
    return Table(
        HEADINGS,
        tuple(
            tuple(_cells(line, _training(line, plain.get((line.attack, line.budget))) if compared else _NONE))
            for line in lines
        ),
    )


def _training(line: Line, plain: float | None) -> Cell:
    seconds = line.seconds.get("train")
    if seconds is None:
        return _NONE
    ratio = f"{seconds / plain:.2f}x; " if plain else ""
    return Cell(f"{seconds:.3g}", f"{ratio}n = {line.n}", seconds)


def method_name(line: Line) -> str:
    """Who defended, or traced and healed, in a few words."""
    if line.control in ("no attack", "no defense"):
        return line.control
    if line.defense != "none":
        return line.defense
    who = line.detector if line.control != "perfect filter" else "perfect filter"
    return who if line.unlearner == "none" else f"{who} → {line.unlearner}"


def attack_name(line: Line) -> str:
    """The attack and its budget."""
    budget = f"{100 * line.budget:g} %" if line.budget <= 1 else f"{line.budget:g} examples"
    return f"{line.attack}, {budget}"


def _cells(line: Line, training: Cell) -> Iterator[Cell]:
    name, attack = method_name(line), attack_name(line)
    yield Cell(name, "", name)
    yield Cell(attack, "", attack)
    yield _proportion(line.success)
    yield _mean(line.success_rate)
    yield _mean(line.clean_accuracy)
    worst, proportion = line.worst_class
    cell = _proportion(proportion)
    yield Cell(cell.text, f"{worst}, {cell.note}" if cell.note else "", cell.value)
    yield (
        Cell(f"{line.observed.successes} of {line.observed.trials}", "", line.observed.successes)
        if (line.observed.trials)
        else Cell("–")
    )
    yield _proportion(line.caught)
    yield _proportion(line.precision)
    yield _proportion(line.clean_lost)
    yield _mean(line.average_precision, share=False)
    bias = line.filter_bias
    yield Cell("–") if bias is None else Cell(percent(bias), f"n = {line.n}", bias)
    yield from (_proportion(one) for one in (line.dropped, line.drop_precision, line.drop_recall))
    yield training
    asked = sum(line.seconds.get(stage, 0.0) for stage in ("find", "heal"))
    stages = ", ".join(f"{stage} {seconds:.3g}" for stage, seconds in line.seconds.items())
    yield Cell(f"{asked:.3g}", f"{stages}; n = {line.n}", asked) if line.seconds else Cell("–")
    peak = line.peak_bytes
    yield Cell(f"{peak / 1e6:,.0f} MB", f"n = {line.n}", peak) if peak else Cell("–")
    yield Cell(str(line.n), "", line.n)


def _proportion(proportion: Proportion) -> Cell:
    if not proportion.trials:
        return Cell("–")
    low, high = (f"{100 * bound:.1f}" for bound in proportion.interval())
    note = f"{proportion.successes:,} of {proportion.trials:,}; {low}–{high} %"
    return Cell(percent(proportion.rate), note, proportion.rate)


def _mean(mean: Mean, *, share: bool = True) -> Cell:
    if not mean.n:
        return Cell("–")
    factor, unit = (100.0, " %") if share else (1.0, "")
    digits = 1 if share else 3
    spread = "" if math.isnan(mean.deviation) else f" ± {factor * mean.deviation:.{digits}f}"
    return Cell(f"{factor * mean.mean:.{digits}f}{spread}{unit}", f"n = {mean.n}", mean.mean)


def leaderboard_markdown(results: Results) -> str:
    """The table as Markdown; what no line has is left out."""
    table = _without_empty(table_of(leaderboard(results)))
    lines = [
        "| " + " | ".join(_markdown(name) for name, _ in table.headings) + " |",
        "|" + "---|" * len(table.headings),
    ]
    for row in table.rows:
        cells = (_markdown(cell.text + (f" ({cell.note})" if cell.note else "")) for cell in row)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"- {name}: {meaning}." for name, meaning in table.headings), ""])


def leaderboard_latex(results: Results) -> str:
    """The table as LaTeX, for the package booktabs; what no line has is left out."""
    table = _without_empty(table_of(leaderboard(results)))
    body = [
        " & ".join(_latex(cell.text + (f" ({cell.note})" if cell.note else "")) for cell in row) + r" \\"
        for row in table.rows
    ]
    return "\n".join(
        [
            f"% {plain(results.name)}: {len(results.table)} of {results.planned} trials",
            r"\begin{tabular}{ll" + "r" * (len(table.headings) - 2) + "}",
            r"\toprule",
            " & ".join(_latex(name) for name, _ in table.headings) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def _without_empty(table: Table) -> Table:
    kept = [
        place
        for place in range(len(table.headings))
        if not table.rows or any(row[place].text != "–" for row in table.rows)
    ]
    return Table(
        tuple(table.headings[place] for place in kept),
        tuple(tuple(row[place] for place in kept) for row in table.rows),
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
    style = _resource("page.css") + _resource("leaderboard.css")
    script = _resource("leaderboard.js")
    environment = Environment(
        loader=DictLoader({"leaderboard": _resource("leaderboard.html.j2")}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["plain"] = plain
    table = _without_empty(table_of(lines))
    return environment.get_template("leaderboard").render(
        results=results,
        description=plain(results.experiment.get("description", "")),
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'",
        headings=table.headings,
        rows=[(bool(line.control), row) for line, row in zip(lines, table.rows, strict=True)],
        plot=_plot(lines) if lines else None,
        growth=_growth(lines),
        comparisons=list(_comparisons(lines)),
        groups=[(method_name(line), attack_name(line), _classes(line), _trials(line)) for line in lines],
    )


def write_leaderboard(path: str | os.PathLike[str], results: Results) -> None:
    """Write the leaderboard to a file, whole or not at all; its suffix (.html, .md, .tex) says how."""
    made = {".md": leaderboard_markdown, ".tex": leaderboard_latex}.get(
        Path(path).suffix.lower(), leaderboard_html
    )
    text = made(results)
    with atomic_file(path) as staging:
        staging.write_text(text, encoding="utf-8", newline="\n")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _classes(line: Line) -> str:
    return "; ".join(
        f"{name} {percent(share.rate)} of {share.trials:,}" for name, share in line.per_class.items()
    )


def _trials(line: Line) -> list[dict[str, Any]]:
    return [
        {
            "subject": f"{row['source']} → {row['target']}"
            + ("" if row["test_index"] is None else f" (test {row['test_index']})"),
            "seed": row["seed"],
            "success": f"{row['attack_successes']} of {row['attack_total']}",
            "accuracy": f"{row['clean_correct']} of {row['clean_total']}",
            "caught": "–" if row["flagged"] is None else f"{row['caught']} of {row['poisons']}",
            "flagged": "–" if row["flagged"] is None else row["flagged"],
            "key": row["key"],
        }
        for row in line.rows
    ]


def _plot(lines: Sequence[Line]) -> Markup:
    """Success against accuracy; the best methods stand in the lower right corner."""
    canvas = Canvas(
        640,
        400,
        "Attack success rate against clean accuracy",
        "Each number is a line of the table; its whiskers are the standard deviations over trials.",
        "plot",
    )
    accuracies = [100 * line.clean_accuracy.mean for line in lines]
    lowest, highest = min(accuracies), max(accuracies)
    pad = max(1.0, 0.08 * (highest - lowest))
    x = Scale(max(0.0, lowest - pad), min(100.0, highest + pad), 48.0, 620.0)
    y = Scale(0.0, 100.0, 340.0, 30.0)
    canvas.y_axis(y, 48.0, "attack success rate, %", right=620.0)
    canvas.x_axis(x, 340.0, "clean accuracy", percent=True)
    for line in lines:
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
    for place, line in enumerate(lines, 1):
        at_x, at_y = x.at(100 * line.clean_accuracy.mean), y.at(100 * line.success_rate.mean)
        kind = "point control" if line.control else "point"
        canvas.add("circle", class_=kind, cx=at_x, cy=at_y, r=3.5)
        canvas.text(at_x + 5, at_y - 5, str(place), "note halo")
    return canvas.render()


def _growth(lines: Sequence[Line]) -> Markup | None:
    """Success rate against the budget, a line each method that was tried with several; None if none was."""
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
    for height, words in sorted(ends):  # names stand right of the plot, pushed apart where lines meet
        at = max(at + 16, height + 4)
        canvas.text(410.0, min(at, 392.0), plain(words, limit=44), "tick")
    return canvas.render()


def _comparisons(lines: Sequence[Line]) -> Iterator[tuple[str, str, str, Comparison]]:
    """Each method with no defense, and methods with each other, on the same attack and budget."""
    count = 0
    for first, second in combinations(lines, 2):
        if (first.attack, first.budget) != (second.attack, second.budget):
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
