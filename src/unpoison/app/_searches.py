"""Run directories as the page shows them: searches, healed models, and one line on each run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch

from unpoison.detectors import Findings
from unpoison.errors import InputError, UnpoisonError
from unpoison.evaluation import recipes_in
from unpoison.report import Answers, ReportData, number, percent
from unpoison.runs import RECORD, RunRecord
from unpoison.training import Trained

_MOST = 500
_FINDINGS = "findings.json"


@final
@dataclass(frozen=True, eq=False)
class Search:
    """Findings, of a run directory or alone.

    Arguments:
        name: the name of the directory; its path where another one has that name.
        folder: the directory.
        data: the content of its report.
        findings: as saved.
        order: Int64[n], all examples, the flagged ones first and then by score.
        suspects: what the command called the inputs that were traced.
        is_run: whether the directory is one of a run, of which a report can be written.
    """

    name: str
    folder: Path
    data: ReportData
    findings: Findings
    order: npt.NDArray[np.int64]
    suspects: tuple[str, ...] = ()
    is_run: bool = True


@final
@dataclass(eq=False)
class Healed:
    """A healed model, from a run directory.

    Arguments:
        name: the name of the directory; its path where another one has that name.
        record: of the run.
        model: None where its network is not one of ours.
        answers: by the kind of the inputs, when they are known.
    """

    name: str
    record: RunRecord
    model: Trained | None
    answers: dict[str, Answers] = field(default_factory=dict)


def findings_of(folder: Path) -> Path | None:
    """Where a directory has findings, if it has some: a run directory, or one of findings alone."""
    return next((one for one in (folder / "findings", folder) if (one / _FINDINGS).is_file()), None)


def read_search(folder: Path, name: str, fingerprint: str) -> Search | None:
    """The search of a directory, where it has one.

    Raises:
        InputError: its findings are damaged, or of another training set.
    """
    place = findings_of(folder)
    if place is None:
        return None
    findings = Findings.load(place)
    if findings.fingerprint != fingerprint:
        raise InputError(
            f"{folder}: its findings are of another training set; give the --data and --poison that were "
            "searched"
        )
    is_run = place != folder
    data = ReportData.from_runs([folder]) if is_run else ReportData.from_findings(findings)
    scores = np.where(data.is_flagged, np.inf, data.scores)
    order = np.argsort(-scores, kind="stable").astype(np.int64)
    order = np.concatenate([data.flagged, order[len(data.flagged) :]])
    suspects = _suspects(RunRecord.load(folder)) if is_run else ()
    return Search(name, folder, data, findings, order, suspects, is_run)


def read_healed(folder: Path, name: str, device: torch.device) -> Healed | None:
    """The healed model of a run directory, where it has one."""
    if not (folder / RECORD).is_file():
        return None
    record = RunRecord.load(folder)
    place = folder / ("healed" if record.verb == "demo" else "model")
    if record.verb not in ("heal", "repair", "demo") or not place.is_dir():
        return None
    try:
        return Healed(name, record, Trained.load(place, device=device))
    except UnpoisonError:  # of a network of the user's own: only what its record says can be shown
        return Healed(name, record, None)


def _suspects(record: RunRecord) -> tuple[str, ...]:
    """What the command called the inputs that a run traced."""
    given = record.configuration.get("suspect")
    if record.verb == "demo":
        return (f"triggered:{record.results['observed']}",)
    return tuple(str(one) for one in given) if isinstance(given, list) else ()


@final
@dataclass(frozen=True)
class Beside:
    """What is known of a directory beside those that are worked on.

    Arguments:
        folder: it.
        verb: which wrote it; "bench" for a store of results.
        started: when, as in run.json.
        told: what came of it, on one line.
        recipes: of a store.
    """

    folder: Path
    verb: str
    started: str = ""
    told: str = ""
    recipes: tuple[str, ...] = ()


def list_beside(folder: Path) -> list[Beside]:
    """The run directories and stores in a directory, the newest first; at most 500 are looked at."""
    try:
        places = sorted(one for one in folder.iterdir() if one.is_dir() and one.name[:1] != ".")[:_MOST]
    except OSError:
        return []
    found = []
    for place in places:
        if recipes := recipes_in(place):
            found.append(Beside(place, "bench", told=f"{len(recipes)} recipes", recipes=recipes))
        elif (place / RECORD).is_file():
            try:
                record = RunRecord.load(place)
                found.append(Beside(place, record.verb, record.started, _told(record)))
            except UnpoisonError as error:
                found.append(Beside(place, "?", told=str(error)))
    return sorted(found, key=lambda one: one.started, reverse=True)


def _told(record: RunRecord) -> str:
    """What a run found or measured."""
    results, parts = record.results, []
    if isinstance(found := results.get("poison_found"), bool):
        p_value, level = results.get("p_value"), results.get("false_alarm_level")
        against = ""
        if isinstance(p_value, float) and isinstance(level, float):
            against = f", p = {number(p_value)} at level {number(level)}"
        parts.append(f"{'poison' if found else 'no poison'} found{against}")
    for name, words in (("clean_accuracy", "clean accuracy"), ("attack_success", "attack success")):
        rates: list[Any] = [results.get(f"{name}{when}") for when in ("", "_before", "_after")]
        if shown := [percent(rate) for rate in rates if isinstance(rate, int | float)]:
            parts.append(f"{words} {' → '.join(shown)}")
    if isinstance(examples := results.get("examples"), int) and not parts:
        parts.append(f"{examples:,} examples")
    return "; ".join(parts)
