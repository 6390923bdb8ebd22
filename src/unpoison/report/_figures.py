"""The figures of the report, each a self-contained SVG drawn from a `ReportData`.

The marked group (poison where the truth is known, else the flagged examples) is always dark, hatched or a
triangle, the other one pale and round, so that every figure can be read in grey.

Cost: one or two passes over all scores; at most `SHOWN_POINTS` points of each group are drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from unpoison._statistics import Proportion
from unpoison.report._data import ReportData
from unpoison.report._svg import Canvas, Floats, Scale, coordinate, fitted, number

SHOWN_POINTS = 2_000


@final
@dataclass(frozen=True)
class Figure:
    """A drawing and its caption."""

    svg: Markup
    caption: str


@final
@dataclass(frozen=True)
class Groups:
    """The marked examples, and the names of the two groups."""

    dark: npt.NDArray[np.bool_]
    dark_name: str
    pale_name: str

    @classmethod
    def of(cls, data: ReportData) -> Groups:
        """Poison against clean where the truth is known, else flagged against the rest."""
        truth = data.is_poison
        if truth is not None:
            return cls(truth, "poison", "clean")
        return cls(data.is_flagged, "flagged", "not flagged")


def _bars(canvas: Canvas, counts: Floats, edges: Floats, base: float, height: Scale, kind: str) -> None:
    """Bars from `base` to the height of their count, as one path, so that the hatching is continuous."""
    path = []
    for count, left, right in zip(counts, edges[:-1], edges[1:], strict=True):
        if count > 0:
            tip = height.at(float(count))
            start = f"M{coordinate(left)} {coordinate(base)}"
            path.append(f"{start}V{coordinate(tip)}H{coordinate(right)}V{coordinate(base)}z")
    if path:
        canvas.add("path", class_=kind, d="".join(path))


def _mirror(canvas: Canvas, values: Floats, groups: Groups, scale: Scale, bins: int, half: int) -> bool:
    """A histogram of the pale examples upwards and of the dark ones downwards; whether any of these is drawn.

    Without dark ones the pale ones take the whole height.
    """
    finite, edges = np.isfinite(values), scale.edges(bins)
    pale, dark = (
        np.histogram(values[finite & mask], edges)[0].astype(np.float64)
        for mask in (~groups.dark, groups.dark)
    )
    top, gap = 30.0, 1.0
    middle = top + (half if dark.any() else 2 * half)
    most = float(max(pale.max(initial=1.0), dark.max(initial=1.0), 10.0)) * 1.3
    up = Scale(0.5, most, middle - gap, top, "log")
    down = Scale(0.5, most, middle + gap, middle + half, "log")
    for counts in (up, down) if dark.any() else (up,):
        for tick in counts.ticks(3):
            y = counts.at(tick)
            canvas.horizontal("grid", scale.start, scale.stop, y)
            canvas.text(scale.start - 7, y + 4, number(tick), "tick", "end")
    _bars(canvas, pale, scale(edges), middle - gap, up, "pale-bar")
    _bars(canvas, dark, scale(edges), middle + gap, down, "dark-bar")
    canvas.horizontal("axis", scale.start, scale.stop, middle)
    canvas.text(0, 12, "examples per bin (logarithmic)", "label")
    return bool(dark.any())


def score_histogram(data: ReportData) -> Figure:
    """A histogram of all scores, with the threshold."""
    groups = Groups.of(data)
    finite = np.isfinite(data.scores)
    threshold = data.threshold
    has_threshold = bool(np.isfinite(threshold))
    shown = np.append(data.scores[finite], [threshold] if has_threshold else [])
    left, right, half = 58.0, 634.0, 118
    scale = fitted(shown, left, right)
    dark_count, pale_count = int(groups.dark.sum()), int((~groups.dark).sum())
    what = f"{pale_count:,} {groups.pale_name} and {dark_count:,} {groups.dark_name}"
    cut = f"; the threshold is {number(threshold)}" if has_threshold else ""
    canvas = Canvas(
        640,
        308,
        "Distribution of the scores",
        f"Histogram of the scores of {what} examples, from {number(float(np.min(shown, initial=0)))} to "
        f"{number(float(np.max(shown, initial=0)))}{cut}; {len(data.flagged):,} examples are flagged.",
        "scores",
    )
    bottom = 30 + 2 * half
    if has_threshold:
        x = scale.at(threshold)
        canvas.add("rect", class_="beyond", x=x, y=24.0, width=max(0.0, right - x), height=float(bottom - 24))
    _mirror(canvas, data.scores, groups, scale, 64, half)
    if has_threshold:
        x = scale.at(threshold)
        canvas.add("path", class_="threshold", d=f"M{coordinate(x)} 20V{bottom}")
        late = x > 0.6 * right
        anchor, shift = ("end", -6) if late else ("start", 6)
        canvas.text(x + shift, 32, f"threshold {number(threshold)}", "note halo", anchor)
    canvas.text(right, 52, f"{groups.pale_name}: {pale_count:,}", "note halo", "end")
    if dark_count:
        canvas.text(right, bottom - 8, f"{groups.dark_name}: {dark_count:,}", "note halo", "end")
    canvas.x_axis(scale, bottom, f"score (higher: more likely poison){_suffix(scale)}")
    beyond = int((data.scores > threshold).sum())
    caption = f"Scores of all {len(data):,} training examples"
    if dark_count:
        caption += f": {groups.pale_name} upwards, {groups.dark_name} downwards"
    if has_threshold:
        caption += f". {beyond:,} lie beyond the threshold (tinted); {len(data.flagged):,} are flagged"
        if beyond and not len(data.flagged):
            caption += " because the findings as a whole are not significant"
    if missing := int((~finite).sum()):
        caption += f". {missing:,} examples without a finite score are left out"
    return Figure(canvas.render(), caption + ".")


def has_collapse(data: ReportData) -> bool:
    """Whether there is the evidence that the influence figures are drawn from."""
    return {"influence_before", "influence_after"} <= set(data.evidence) and len(data) > 0


def _influence_scale(data: ReportData, start: float, stop: float) -> Scale:
    before, after = data.evidence["influence_before"], data.evidence["influence_after"]
    return fitted(np.concatenate([before, after]), start, stop, margin=0.06)


def _suffix(scale: Scale) -> str:
    return "; axis compressed away from 0" if scale.kind == "asinh" else ""


def influence_slope(data: ReportData) -> Figure:
    """The median and the middle 90 % of both groups, before and after the transformations."""
    groups = Groups.of(data)
    before, after = data.evidence["influence_before"], data.evidence["influence_after"]
    top, bottom, x = 30.0, 296.0, (82.0, 268.0)
    scale = _influence_scale(data, bottom, top)
    parts, ends = [], []
    canvas = Canvas(360, 340, "Influence before and after the change of the query", "", "slope")
    canvas.y_axis(scale, 56, "influence on the prediction", right=288)
    for mask, name, kind in (
        (~groups.dark, groups.pale_name, "pale"),
        (groups.dark, groups.dark_name, "dark"),
    ):
        usable = mask & np.isfinite(before) & np.isfinite(after)
        if not usable.any():
            continue
        low0, mid0, high0 = np.quantile(before[usable], [0.05, 0.5, 0.95])
        low1, mid1, high1 = np.quantile(after[usable], [0.05, 0.5, 0.95])
        corners = zip((x[0], x[1], x[1], x[0]), scale([high0, high1, low1, low0]), strict=True)
        canvas.lines(f"{kind}-band", corners, closed=True)
        y0, y1 = scale.at(mid0), scale.at(mid1)
        canvas.lines(f"{kind}-line", ((x[0], y0), (x[1], y1)))
        draw = canvas.triangles if kind == "dark" else canvas.dots
        draw(np.array(x), np.array([y0, y1]), f"{kind}-{'triangle' if kind == 'dark' else 'marker'}")
        ends.append((y1, name))
        parts.append(f"median of the {name} examples {number(mid0)} before, {number(mid1)} after")
    if len(ends) == 2 and abs(ends[0][0] - ends[1][0]) < 16:
        (a, first), (b, second) = sorted(ends)
        ends = [((a + b) / 2 - 8, first), ((a + b) / 2 + 8, second)]
    for y, name in ends:
        canvas.text(x[1] + 9, y + 4, name, "note halo")
    canvas.text(x[0], bottom + 20, "before", "tick", "middle")
    canvas.text(x[1], bottom + 20, "after", "tick", "middle")
    canvas.text((x[0] + x[1]) / 2, bottom + 38, "change of the query", "label", "middle")
    canvas.description = "Slope chart: " + "; ".join(parts) + "."
    caption = f"Median and middle 90 % of each group{_suffix(scale)}."
    return Figure(canvas.render(), caption)


def influence_scatter(data: ReportData) -> Figure:
    """The influence of each example before the transformations against its mean influence after them."""
    groups = Groups.of(data)
    before, after = data.evidence["influence_before"], data.evidence["influence_after"]
    finite = np.isfinite(before) & np.isfinite(after)
    left, right, top, bottom = 56.0, 352.0, 30.0, 296.0
    x = _influence_scale(data, left, right)
    y = _influence_scale(data, bottom, top)
    predicted = data.class_name(data.predicted) if data.predicted is not None else None
    canvas = Canvas(
        360,
        340,
        "Influence before against after",
        "Scatter plot, one mark for each example; below the diagonal an example has lost influence on the "
        "prediction" + (f" “{predicted}”." if predicted is not None else "."),
        "scatter",
    )
    canvas.y_axis(y, left, "mean influence after", right=right)
    low, high = max(x.low, y.low), min(x.high, y.high)
    (x0, x1), (y0, y1) = x([low, high]), y([low, high])
    canvas.lines("diagonal", ((x0, y0), (x1, y1)))
    shown, pale = _sampled(finite & ~groups.dark, groups.pale_name, seed=0)
    canvas.dots(x(before[shown]), y(after[shown]), "pale-dot")
    marked, dark = _sampled(finite & groups.dark, groups.dark_name, seed=1)
    canvas.triangles(x(before[marked]), y(after[marked]), "dark-triangle small", 3.0)
    canvas.text(right - 4, 44, "unchanged", "note faint halo", "end")
    label = (
        "influence before"
        if predicted is None
        else f"influence on “{data.class_name(data.predicted or 0, limit=22)}” before"
    )
    canvas.x_axis(x, bottom, label, wanted=4)
    caption = f"Below the diagonal: influence lost. Circles: {pale}"
    if len(marked):
        caption += f"; triangles: {dark}"
    return Figure(canvas.render(), caption + f"{_suffix(x)}.")


def _sampled(mask: npt.NDArray[np.bool_], name: str, *, seed: int) -> tuple[npt.NDArray[np.intp], str]:
    """At most `SHOWN_POINTS` examples of a group, and how many they are in words."""
    chosen = np.flatnonzero(mask)
    total = len(chosen)
    if total <= SHOWN_POINTS:
        return chosen, f"all {total:,} {name} examples"
    chosen = np.sort(np.random.default_rng(seed).choice(chosen, SHOWN_POINTS, replace=False))
    return chosen, f"{SHOWN_POINTS:,} of {total:,} {name} examples, drawn at random"


def collapses(data: ReportData) -> Figure | None:
    """A histogram of the number of draws in which the influence of an example collapsed."""
    if "collapses" not in data.evidence or not len(data):
        return None
    groups = Groups.of(data)
    values = data.evidence["collapses"]
    finite = np.isfinite(values)
    draws = max(len(data.draws), int(np.max(values[finite], initial=1)))
    left, right, half = 56.0, 352.0, 133
    bins = draws + 1 if draws <= 60 else 51
    scale = Scale(-0.5, draws + 0.5, left, right)
    parts = []
    for mask, name in ((groups.dark, groups.dark_name), (~groups.dark, groups.pale_name)):
        if (mask & finite).any():
            parts.append(f"median of the {name} examples {np.median(values[mask & finite]):g} of {draws}")
    canvas = Canvas(360, 340, "Number of collapses", "Histogram: " + "; ".join(parts) + ".", "collapses")
    mirrored = _mirror(canvas, values, groups, scale, bins, half)
    canvas.text(left + 6, 44, groups.pale_name, "note halo")
    if mirrored:
        canvas.text(left + 6, 24 + 2 * half, groups.dark_name, "note halo")
    canvas.x_axis(scale, 30 + 2 * half, "draws in which influence collapsed", wanted=5)
    caption = "; ".join(parts)
    if mirrored:
        caption = f"{groups.pale_name} upwards, {groups.dark_name} downwards: {caption}"
    return Figure(canvas.render(), caption[:1].upper() + caption[1:] + ".")


def outcome_bars(data: ReportData) -> Figure | None:
    """Clean accuracy and attack success of the models, with 95 % Wilson intervals."""
    left, right, pitch = 150.0, 560.0, 30
    rows = [
        (quantity, [(o.name, getattr(o, key)) for o in data.outcomes if getattr(o, key) is not None])
        for quantity, key in (("Clean accuracy", "clean_accuracy"), ("Attack success", "attack_success"))
    ]
    rows = [(quantity, bars) for quantity, bars in rows if bars]
    if not rows:
        return None
    height = sum(30 + pitch * len(bars) for _, bars in rows) + 62
    parts = "; ".join(
        f"{q.lower()} {name.lower()} {rate_text(rate)}" for q, bars in rows for name, rate in bars
    )
    canvas = Canvas(640, height, "Before and after healing", f"Bar chart: {parts}.", "outcomes")
    scale = Scale(0.0, 100.0, left, right)
    for tick in scale.ticks():
        canvas.add("path", class_="grid", d=f"M{coordinate(scale.at(tick))} 8V{height - 52}")
    y = 6.0
    for quantity, bars in rows:
        canvas.text(0, y + 16, quantity, "heading")
        y += 26
        for name, rate in bars:
            value = rate.rate if isinstance(rate, Proportion) else rate
            if value == value:
                kind = {"Before": "dark-bar", "After": "healed-bar"}.get(name.split()[0], "pale-bar")
                width = scale.at(100 * value) - left
                canvas.add("rect", class_=kind, x=left, y=y + 4, width=width, height=16)
            end = value if value == value else 0.0
            if isinstance(rate, Proportion):
                low, high = (scale.at(100 * bound) for bound in rate.interval())
                centre = y + 12
                path = f"M{coordinate(low)} {coordinate(centre)}H{coordinate(high)}"
                path += "".join(f"M{coordinate(x)} {coordinate(centre - 4)}v8" for x in (low, high))
                canvas.add("path", class_="whisker-ground", d=path)
                canvas.add("path", class_="whisker", d=path)
                end = max(end, rate.interval()[1])
            canvas.text(left - 10, y + 16, name, "tick", "end")
            canvas.text(scale.at(100 * end) + 8, y + 16, percent(value), "note halo")
            y += pitch
        y += 4
    canvas.x_axis(scale, height - 46, "share of the test images", percent=True)
    return Figure(canvas.render(), "Whiskers: 95 % Wilson intervals.")


def percent(share: float) -> str:
    """A share as a percentage with one decimal; never 100 % or 0 % by rounding.

    >>> percent(0.98), percent(0.99999), percent(1.0), percent(0.0001), percent(float("nan"))
    ('98.0 %', '> 99.9 %', '100 %', '< 0.1 %', 'not measured')
    """
    if share != share:
        return "not measured"
    if share in (0.0, 1.0):
        return f"{100 * share:.0f} %"
    if share > 0.9995:
        return "> 99.9 %"
    return "< 0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %".replace("-", "−")


def interval_text(rate: Proportion) -> str:
    """The 95 % Wilson interval in per cent.

    >>> interval_text(Proportion(98, 100))
    '93.0–99.4 %'
    """
    low, high = (f"{100 * bound:.1f}" for bound in rate.interval())
    return f"{low}–{high} %"


def rate_text(rate: Proportion | float | None) -> str:
    """A rate with its count and interval.

    >>> rate_text(Proportion(98, 100)), rate_text(0.5), rate_text(None)
    ('98.0 % (98 of 100; 93.0–99.4 %)', '50.0 % (n not recorded)', 'not measured')
    """
    if rate is None:
        return "not measured"
    if isinstance(rate, Proportion):
        if not rate.trials:
            return "not measured"
        return f"{percent(rate.rate)} ({rate.successes:,} of {rate.trials:,}; {interval_text(rate)})"
    return f"{percent(rate)} (n not recorded)"
