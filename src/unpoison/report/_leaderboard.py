"""The leaderboard: the results of a recipe as a page, or as the table alone.

`leaderboard_html` is one self-contained page: a table that a click on a heading sorts, methods against
attacks where there are several, a plot of attack success against accuracy, growth with the budget where
the recipe has several, paired comparisons, and every trial; each cell of the table links to the trials
that it was computed from. The page loads nothing: its policy allows its one style sheet and its one
script, both named by hash.

The same results give the same bytes. Reading 10,000 trials and writing the page takes a few seconds.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations, groupby
from pathlib import Path
from typing import Any

from markupsafe import Markup

from unpoison._artefacts import atomic_file
from unpoison.evaluation import Comparison, Line, Results, compare, leaderboard
from unpoison.report._figures import percent
from unpoison.report._matrix import matrices
from unpoison.report._svg import Canvas, Scale, plain
from unpoison.report._table import (
    Column,
    attack_name,
    method_name,
    single_inputs,
    table_of,
)
from unpoison.report._table_text import leaderboard_latex, leaderboard_markdown
from unpoison.report._templates import environment, policy, resource

_MOST_COMPARISONS = 200


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
            matrices=list(matrices(lines)),
            growth=_growth(lines),
            comparisons=list(_comparisons(lines)),
            single=all(map(single_inputs, lines)),
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
                ends = ((low, at_y), (high, at_y)) if across else ((at_x, low), (at_x, high))
                canvas.lines("spread", ends)
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
        canvas.lines("pale-line", points)
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
