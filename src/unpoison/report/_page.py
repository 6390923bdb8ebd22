"""The report: one self-contained HTML page that shows the findings and the evidence for them.

The page loads nothing: images are `data:` addresses, figures are inline SVG, there is no script, and a
Content-Security-Policy forbids everything but those images and the one style sheet, which it names by hash.
Text from data that got past the escaping could therefore neither run nor fetch anything.

The same runs give the same bytes. A page on 50,000 examples takes about a second and is below 3 MB: the
figures hold counts and a bounded number of points, never one mark for each example.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, final

from jinja2 import Environment
from markupsafe import Markup

from unpoison._artefacts import atomic_file
from unpoison._statistics import Proportion
from unpoison.report import _figures as figures
from unpoison.report._data import Rate, ReportData
from unpoison.report._identifiers import identifiers_of
from unpoison.report._pictures import OBSERVATION_SIDE, data_uri
from unpoison.report._svg import hatch, number, plain
from unpoison.report._templates import environment, policy, resource
from unpoison.runs import RunRecord

SHOWN_EXAMPLES = 24


def write_report(path: str | os.PathLike[str], runs: Sequence[str | os.PathLike[str]]) -> None:
    """Write the report of the run directories `runs` to the file `path`, whole or not at all.

    Arguments:
        path: of the HTML file; an existing one is replaced.
        runs: run directories that belong together: a `demo`, or a `trace` or `scan` with the `craft`, `train`
            and `heal` runs of the same model. The order does not matter.

    Raises:
        InputError: there is not exactly one run with findings, or something in a directory is damaged.
        MismatchError: the runs do not belong together.
    """
    page = render(ReportData.from_runs(runs))
    with atomic_file(path) as staging:
        staging.write_text(page, encoding="utf-8", newline="\n")


def render(data: ReportData) -> str:
    """The page as HTML text."""
    style = resource("page.css")
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            data=data,
            # Jinja keeps the text as it is in between; the hash is of exactly these bytes.
            style=Markup(style),
            policy=policy(style),
            verdict=verdict(data),
            key_figures=_key_figures(data),
            hatch=hatch(),
            observation=_observation(data),
            draws=_draws(data),
            cause=_cause(data),
            rounds=_rounds(data),
            examples=_examples(data),
            shown_examples=SHOWN_EXAMPLES,
            threshold_how=sentence(data.threshold_how),
            summary=sentence(data.summary),
            histogram=figures.score_histogram(data) if len(data) else None,
            collapse=_collapse(data),
            outcome_bars=figures.outcome_bars(data),
            timings=_timings(data),
            versions=_versions(data),
            configurations=_configurations(data),
            identifiers=identifiers_of(traced=data.predicted is not None),
        )
    )


def verdict(data: ReportData) -> str:
    """The verdict as one sentence, the heading of the page."""
    said = f"“{data.class_name(data.predicted, limit=60)}”" if data.predicted is not None else None
    truth = f"“{data.class_name(data.true_label, limit=60)}”" if data.true_label is not None else None
    if not data.poison_found:
        if said is None:
            return f"No poison found among {len(data):,} training examples"
        return f"No poison found behind the prediction {said}" + (f" for this {truth}" if truth else "")
    count = f"{len(data.flagged):,} of {len(data):,} training examples"
    if said is None:
        return f"Poison found: {count} are flagged"
    return f"Poison found: {count} cause the prediction {said}" + (
        f" for this {truth}" if truth else " for this input"
    )


def sentence(text: str) -> str:
    """One line with a capital at its beginning and a full stop at its end.

    >>> sentence("chosen on clean points"), sentence("Why not?"), sentence("")
    ('Chosen on clean points.', 'Why not?', '')
    """
    line = plain(text)
    if not line:
        return ""
    return line[0].upper() + line[1:] + ("" if line[-1] in ".!?…" else ".")


@final
@dataclass(frozen=True)
class KeyFigure:
    """A number at the head of the page."""

    label: str
    value: str
    note: str = ""


def _key_figures(data: ReportData) -> list[KeyFigure]:
    found = [
        KeyFigure(
            "Flagged",
            f"{len(data.flagged):,}",
            f"{figures.percent(len(data.flagged) / max(1, len(data)))} of {len(data):,} examples",
        )
    ]
    if data.p_value is not None and data.false_alarm_level is not None:
        sign = "at most" if data.p_value <= data.false_alarm_level else "above"
        note = f"{sign} the level,\n{number(data.false_alarm_level)}"
        found.append(KeyFigure("p-value", number(data.p_value), note))
    precision, recall = data.precision, data.recall
    if precision is not None and recall is not None:
        found.append(_share("Precision", precision, "flagged"))
        found.append(_share("Recall", recall, "poisons"))
    before = next((o for o in data.outcomes if o.name.startswith("Before")), None)
    after = next((o for o in data.outcomes if o.name.startswith("After")), None)
    for label, first, last in (
        ("Attack success", before and before.attack_success, after and after.attack_success),
        ("Clean accuracy", before and before.clean_accuracy, after and after.clean_accuracy),
    ):
        if first is None and last is None:
            continue
        if first is None or last is None:
            state = "before healing" if last is None else "after healing"
            rate = last if first is None else first
            found.append(KeyFigure(f"{label} {state}", _short(rate), _count(rate)))
        else:
            found.append(
                KeyFigure(f"{label}, before → after", f"{_short(first)} → {_short(last)}", _both(first, last))
            )
    if data.seconds:
        found.append(KeyFigure("Time of the search", duration(_total(data.seconds)), "without healing"))
    return found


def _share(label: str, rate: Proportion, what: str) -> KeyFigure:
    if not rate.trials:
        return KeyFigure(
            label, "–", "nothing was flagged" if label == "Precision" else "nothing was poisoned"
        )
    return KeyFigure(label, figures.percent(rate.rate), f"{rate.successes:,} of {rate.trials:,} {what}")


def _short(rate: Rate | None) -> str:
    if rate is None:
        return "–"
    return figures.percent(rate.rate if isinstance(rate, Proportion) else rate)


def _count(rate: Rate | None) -> str:
    return f"{rate.successes:,} of {rate.trials:,}" if isinstance(rate, Proportion) else "n not recorded"


def _interval(rate: Rate | None) -> str:
    return figures.interval_text(rate) if isinstance(rate, Proportion) else "no interval"


def _both(first: Rate, last: Rate) -> str:
    if isinstance(first, Proportion) and isinstance(last, Proportion):
        before = "" if first.trials == last.trials else f"{first.trials:,} → "
        return f"{_interval(first)} → {_interval(last)}\nn = {before}{last.trials:,}"
    return "n not recorded"


def duration(seconds: float) -> str:
    """Seconds as text.

    >>> duration(0.42), duration(21.48), duration(2607)
    ('0.42 s', '21.5 s', '43 min 27 s')
    """
    if seconds < 60:
        return f"{number(seconds)} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def _total(seconds: Mapping[str, float]) -> float:
    """The `total` stage where there is one, else the sum of the stages."""
    return float(seconds["total"]) if "total" in seconds else float(sum(seconds.values()))


def _observation(data: ReportData) -> dict[str, Any] | None:
    if data.observation is None or not len(data.observation):
        return None
    shown = data.observation[:8]
    return {
        "images": [data_uri(image, longest_side=OBSERVATION_SIDE) for image in shown],
        "hidden": len(data.observation) - len(shown),
        "predicted": None if data.predicted is None else data.class_name(data.predicted),
        "true": None if data.true_label is None else data.class_name(data.true_label),
        "size": "{2} × {1} pixels, {0} channel{3}".format(
            *data.observation.shape[1:], "" if data.observation.shape[1] == 1 else "s"
        ),
    }


def _cause(data: ReportData) -> dict[str, Any] | None:
    """What the responsible examples have in common: the kind and the numbers behind it."""
    cause = data.cause
    if cause is None:
        return None
    rows = [("Examples that stand out", f"{cause.examples:,}")]
    if cause.examples:
        rows += [
            ("Unlike images among them", f"{number(cause.distinct)} (effective number)"),
            ("Resemble one of them", figures.percent(cause.largest_series)),
            ("Rank of their margins in the class", f"{number(cause.margin_rank)} (0: fitted worst, 1: best)"),
        ]
        if cause.second_label is not None:
            second = (
                f"{figures.percent(cause.second_share)} “{data.class_name(cause.second_label, limit=60)}”"
            )
            rows.append(("Second likeliest label", second))
    return {"kind": cause.kind.capitalize(), "rows": rows}


def _rounds(data: ReportData) -> list[dict[str, str]]:
    """The models of a repair, a row each."""
    rows = []
    for place, one in enumerate(data.rounds):
        counts = Counter(plain(answer) for answer in one["answers"])
        known = one["flagged"] and one["flagged_poison"] is not None
        poison = f", {one['flagged_poison']:,} of them poison" if known else ""
        beside = len(one.get("mislabelled", ()))
        more = f"; also removed: {beside:,} of {one['withheld']:,} withheld" if beside else ""
        rows.append(
            {
                "model": ("As given", "Healed")[place > 0] + (f", round {place}" if place else ""),
                "answer": ", ".join(
                    answer if len(counts) == 1 else f"{answer} ({count})" for answer, count in counts.items()
                ),
                "copies": f"{one['copies']['successes']:,} of {one['copies']['trials']:,}",
                "p": "–" if one["p_value"] is None else number(one["p_value"]),
                "flagged": f"{one['flagged']:,}{poison}{more}",
            }
        )
    return rows


def _draws(data: ReportData) -> list[dict[str, Any]]:
    images = data.draw_images if data.draw_images is not None else ()
    return [
        {
            "name": plain(draw.name),
            "label": data.class_name(draw.label),
            "image": data_uri(images[place], longest_side=64) if place < len(images) else None,
        }
        for place, draw in enumerate(data.draws[:200])
    ]


def _examples(data: ReportData) -> list[dict[str, Any]]:
    truth, flagged = data.is_poison, data.is_flagged
    origin = {}
    if data.poison is not None and data.poison_clean_labels is not None:
        origin = dict(zip(data.poison.tolist(), data.poison_clean_labels.tolist(), strict=True))
    items = []
    for place, index in enumerate(data.top_indices.tolist()):
        label = int(data.labels[index])
        clean_label = origin.get(index)
        items.append(
            {
                "index": index,
                "label": data.class_name(label),
                "was": None if clean_label in (None, label) else data.class_name(clean_label),
                "score": number(float(data.scores[index])),
                "flagged": bool(flagged[index]),
                "truth": None if truth is None else bool(truth[index]),
                "image": None if data.top_images is None else data_uri(data.top_images[place]),
            }
        )
    return items


def _collapse(data: ReportData) -> list[figures.Figure]:
    if not figures.has_collapse(data):
        return []
    drawn = [figures.influence_slope(data), figures.influence_scatter(data), figures.collapses(data)]
    return [figure for figure in drawn if figure is not None]


def _run_name(name: str, record: RunRecord) -> str:
    verb, name = plain(record.verb), plain(name, limit=60)
    return verb if verb == name else f"{verb} ({name})"


def _timings(data: ReportData) -> list[dict[str, Any]]:
    tables: list[tuple[str, Mapping[str, float]]] = [
        (f"Time of {_run_name(name, record)}", record.seconds) for name, record in data.runs
    ]
    tables.append((f"Time of the search by {plain(data.method)}", data.seconds))
    return [
        {
            "name": name,
            "rows": [
                {
                    "stage": plain(stage).replace("_", " "),
                    "seconds": duration(value),
                    "share": "" if stage == "total" else _bar(value, seconds),
                }
                for stage, value in seconds.items()
            ],
        }
        for name, seconds in tables
        if seconds
    ]


def _bar(value: float, seconds: Mapping[str, float]) -> Markup:
    """A bar of the stage's share of the slowest stage, as SVG because inline styles are forbidden."""
    most = max((value for stage, value in seconds.items() if stage != "total"), default=0.0)
    width = 100 * value / most if most > 0 and math.isfinite(value) else 0.0
    return Markup(
        '<svg class="share" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="share-bar" width="{}" height="8"/></svg>'
    ).format(f"{max(width, 0.5):.1f}")


def _versions(data: ReportData) -> list[tuple[str, list[tuple[str, str]]]]:
    found = []
    for run, record in data.runs:
        rows = [(plain(name), plain(value)) for name, value in record.versions.items()]
        rows += [(f"code: {plain(name)}", plain(value)[:16]) for name, value in record.code.items() if value]
        rows += [(f"device: {plain(name)}", plain(value)) for name, value in record.device.items()]
        rows += [("seed", plain(record.seed)), ("started", plain(record.started))]
        found.append((f"Versions of {_run_name(run, record)}", rows))
    return found


def _configurations(data: ReportData) -> list[tuple[str, str]]:
    named = [(f"Detector: {plain(data.method)}", data.configuration)]
    named += [(f"Run: {_run_name(name, record)}", record.configuration) for name, record in data.runs]
    return [
        (name, json.dumps(value, indent=2, ensure_ascii=True, default=str)) for name, value in named if value
    ]


@cache
def _environment() -> Environment:
    made = environment().overlay()
    made.filters = {
        **made.filters,
        "number": number,
        "duration": duration,
        "rate": figures.rate_text,
        "short": _short,
        "count": _count,
        "interval": _interval,
        "total": _total,
    }
    return made
