"""`ReportData`: everything that one report shows, as plain arrays and numbers, gathered from run directories.

The page knows neither models nor detectors nor files: it can be written from any `ReportData`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
import numpy.typing as npt

from unpoison._statistics import Proportion
from unpoison.errors import InputError, MismatchError
from unpoison.report._svg import plain
from unpoison.runs import RunRecord

if TYPE_CHECKING:
    from unpoison.detectors import Cause, Draw, Findings

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

Rate = Proportion | float
"""A rate over a known number of trials, or a bare number where a run recorded no more than that."""


@final
@dataclass(frozen=True)
class Outcome:
    """One model, measured on examples that were in no training set."""

    name: str
    clean_accuracy: Rate | None = None
    attack_success: Rate | None = None


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class ReportData:
    """The content of one report: observation, findings, their significance, and the effect of healing.

    Arguments:
        method: the name of the detector.
        poison_found: the verdict.
        summary: the verdict in one sentence, as the detector gave it.
        class_names: of the training set.
        labels: Int64[n] of the training set.
        scores: Float[n]; higher means more likely poison.
        flagged: Int64[k], the highest scores first.
        threshold: in the unit of the scores; infinite when nothing could be flagged.
        threshold_how: how it was chosen, in words.
        tracked_share: the share of the model's parameters that was measured, for detectors by influence.
        untracked: the names of the other parameters.
        false_alarm_level: as stated by the method, if it states one.
        p_value: the probability of such findings for an ordinary error, if the method gives one.
        cause: what the responsible examples have in common, if the method tells.
        answered: whether the label that was traced is the model's answer.
        evidence: Float[n] columns by name; `influence_before`, `influence_after` and `collapses` are drawn.
        observation: UInt8[m c h w], or None.
        predicted: the wrong label that the model gave to the observation.
        true_label: the right one, where known.
        draws: the transformations and labels that were tried.
        draw_images: UInt8[draws c h w], the observation under each of them.
        top_indices: Int64[b], the examples to show, the highest scores first.
        top_images: UInt8[b c h w], their images, or None.
        poison: Int64[p], the true poison, or None where it is not known.
        poison_clean_labels: Int64[p], the labels of the poisoned examples before the attack, or None.
        attack: the name of the attack, where known.
        average_precision: of the scores against the truth, where known.
        outcomes: models before and after healing, in order.
        configuration: the settings of the detector.
        seconds: of the detector, by stage.
        peak_bytes: the highest memory of the process up to the end of the search; 0 where not known.
        rounds: the models of a `repair` run, as its run.json has them.
        repaired: what came of it, in one sentence.
        runs: the names and records of the runs that all of this is from.

    Raises:
        InputError: lengths do not fit each other.
    """

    method: str
    poison_found: bool
    summary: str
    class_names: tuple[str, ...]
    labels: Integers
    scores: Floats
    flagged: Integers
    threshold: float
    threshold_how: str
    tracked_share: float | None = None
    untracked: tuple[str, ...] = ()
    false_alarm_level: float | None = None
    p_value: float | None = None
    cause: Cause | None = None
    answered: bool = True
    evidence: Mapping[str, Floats] = field(default_factory=dict)
    observation: Bytes | None = None
    predicted: int | None = None
    true_label: int | None = None
    draws: tuple[Draw, ...] = ()
    draw_images: Bytes | None = None
    top_indices: Integers = field(default_factory=lambda: np.empty(0, np.int64))
    top_images: Bytes | None = None
    poison: Integers | None = None
    poison_clean_labels: Integers | None = None
    attack: str | None = None
    average_precision: float | None = None
    outcomes: tuple[Outcome, ...] = ()
    configuration: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    rounds: tuple[Mapping[str, Any], ...] = ()
    repaired: str = ""
    runs: tuple[tuple[str, RunRecord], ...] = ()

    def __post_init__(self) -> None:
        n = len(self.scores)
        columns = {"labels": self.labels, **self.evidence}
        for name, column in columns.items():
            if len(column) != n:
                raise InputError(f"report: {len(column)} values of {name} for {n} scores")
        if self.top_images is not None and len(self.top_images) != len(self.top_indices):
            raise InputError(
                f"report: {len(self.top_images)} images for {len(self.top_indices)} examples to show"
            )
        shown = {"flagged": self.flagged, "shown": self.top_indices, "poison": self.poison}
        for name, indices in shown.items():
            if indices is not None and len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < n:
                raise MismatchError(
                    f"report: {name} examples up to {int(indices.max())}, but the findings are of {n} "
                    "examples; give run directories that belong together"
                )

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def is_flagged(self) -> npt.NDArray[np.bool_]:
        """Bool[n]."""
        return _mask(len(self), self.flagged)

    @property
    def is_poison(self) -> npt.NDArray[np.bool_] | None:
        """Bool[n], or None where the truth is not known."""
        return None if self.poison is None else _mask(len(self), self.poison)

    @property
    def precision(self) -> Proportion | None:
        """The share of the flagged examples that are poison, where the truth is known."""
        return None if self.poison is None else Proportion(self._true_positives, len(self.flagged))

    @property
    def recall(self) -> Proportion | None:
        """The share of the poison that is flagged, where the truth is known."""
        return None if self.poison is None else Proportion(self._true_positives, len(np.unique(self.poison)))

    @property
    def _true_positives(self) -> int:
        return 0 if self.poison is None else len(np.intersect1d(self.flagged, self.poison))

    def class_name(self, label: int, *, limit: int | None = None) -> str:
        """The name of a class as one line of plain text, or its number where it has no visible name."""
        name = plain(self.class_names[label], limit=limit) if 0 <= label < len(self.class_names) else ""
        return name or f"class {label}"

    @classmethod
    def from_runs(cls, paths: Sequence[str | os.PathLike[str]]) -> ReportData:
        """Gather the data of a report from run directories that belong together.

        One of them must hold `findings/` (verbs `trace`, `scan`, `repair` and `demo`). Where one of them
        holds `poison/`, the report shows the truth; where they hold measurements before and after healing,
        those.

        Raises:
            InputError: a path is no run directory, none holds findings, or more than one does.
            MismatchError: the findings and the poison set are of different training sets.
        """
        from unpoison.detectors import Findings

        if not paths:
            raise InputError("report: give at least one run directory")
        folders = [Path(path) for path in paths]
        for folder in folders:
            if not (folder / "run.json").is_file():
                told = "is no directory" if folder.exists() else "no such directory"
                told = "has no run.json" if folder.is_dir() else told
                raise InputError(f"{folder}: {told}; give run directories that verbs of unpoison wrote")
        runs = tuple((folder.resolve().name, RunRecord.load(folder)) for folder in folders)
        found = [folder for folder in folders if (folder / "findings").is_dir()]
        if not found:
            raise InputError(
                f"report: no findings in {', '.join(map(str, folders))}; add the directory of a `trace` or "
                "`scan` run"
            )
        if len(found) > 1:
            raise InputError(
                f"report: findings in {found[0]} and in {found[1]}; a report is about one search, "
                "so give one of them"
            )
        findings = Findings.load(found[0] / "findings")
        indices, images = _top_examples(found[0], findings.ranking().numpy())

        poisoned = next((folder for folder in folders if (folder / "poison").is_dir()), None)
        truth: dict[str, Any] = {}
        if poisoned is not None:
            from unpoison.threats import PoisonSet

            poison_set = PoisonSet.load(poisoned / "poison")
            truth = {
                "poison": poison_set.indices.numpy(),
                "poison_clean_labels": poison_set.clean_labels.numpy(),
                "attack": poison_set.attack,
                "average_precision": findings.judge(poison_set).average_precision,
            }
        repair = next((record.results for _, record in runs if record.verb == "repair"), {})
        return cls.from_findings(
            findings,
            top_indices=indices,
            top_images=images,
            outcomes=_outcomes([record for _, record in runs]),
            rounds=tuple(repair.get("rounds", ())),
            repaired=str(repair.get("repair", "")),
            runs=runs,
            **truth,
        )

    @classmethod
    def from_findings(cls, findings: Findings, **more: Any) -> ReportData:
        """What findings alone say; `more` are other arguments, from what else is known."""
        observation = findings.observation
        pictures = None if observation is None else observation.pictures
        return cls(
            method=findings.method,
            poison_found=findings.poison_found,
            summary=findings.summary,
            class_names=findings.class_names,
            labels=findings.labels.numpy(),
            scores=findings.scores.double().numpy(),
            flagged=findings.flagged.numpy(),
            threshold=findings.threshold.value,
            threshold_how=findings.threshold.how,
            tracked_share=findings.tracked_share,
            untracked=findings.untracked,
            false_alarm_level=findings.threshold.false_alarm_level,
            p_value=findings.p_value,
            cause=findings.cause,
            answered=observation is None or observation.answered,
            evidence={name: column.double().numpy() for name, column in findings.evidence.items()},
            observation=None if observation is None or pictures is None else pictures.numpy(),
            predicted=None if observation is None else observation.predicted,
            true_label=None if observation is None else observation.true_label,
            draws=findings.draws,
            draw_images=None if findings.draw_images is None else findings.draw_images.numpy(),
            configuration=findings.configuration,
            seconds=findings.seconds,
            peak_bytes=findings.peak_bytes,
            **more,
        )


def _mask(n: int, indices: Integers) -> npt.NDArray[np.bool_]:
    mask = np.zeros(n, dtype=np.bool_)
    mask[indices] = True
    return mask


def _top_examples(folder: Path, ranking: Integers) -> tuple[Integers, Bytes | None]:
    """The examples that a run kept images of; the 64 highest scores where it kept none."""
    import safetensors
    from safetensors.numpy import load_file

    file = folder / "blamed.safetensors"
    if not file.is_file():
        return ranking[:64], None
    try:
        tensors = load_file(file)
        return tensors["indices"].astype(np.int64), tensors["images"]
    except (OSError, safetensors.SafetensorError, KeyError) as error:
        raise InputError(f"{file}: damaged ({type(error).__name__}: {str(error).splitlines()[0]})") from None


def rate_of(results: Mapping[str, Any], name: str) -> Rate | None:
    """A result by name: with its n from `measured` where a run recorded it there, else the bare number."""
    measured = results.get("measured")
    for value in (measured.get(name) if isinstance(measured, Mapping) else None, results.get(name)):
        if isinstance(value, Mapping):
            successes, trials = value.get("successes"), value.get("trials")
            if isinstance(successes, int) and isinstance(trials, int):
                return Proportion(successes, trials)
            value = value.get("rate")
        if isinstance(value, int | float):
            return float(value)
    return None


_OUTCOMES = {
    "before": ("Before healing", ("demo", "train", "trace", "heal", "repair")),
    "after": ("After healing", ("demo", "heal", "repair")),
    "control": ("Never poisoned", ("demo", "train")),
}


def _outcomes(records: Sequence[RunRecord]) -> tuple[Outcome, ...]:
    """The models that the runs measured, recognised by the names of the results.

    `clean_accuracy_before` and the like come from any run; a run that trains or heals one model may leave the
    suffix out.
    """
    outcomes = []
    for suffix, (name, verbs) in _OUTCOMES.items():
        rates: dict[str, Rate | None] = {}
        for quantity in ("clean_accuracy", "attack_success"):
            keys = [(record, f"{quantity}_{suffix}") for record in records if record.verb in verbs]
            bare = {"before": "train", "after": "heal"}.get(suffix)
            keys += [(record, quantity) for record in records if record.verb == bare]
            rates[quantity] = next(
                (rate for record, key in keys if (rate := rate_of(record.results, key)) is not None), None
            )
        if any(rate is not None for rate in rates.values()):
            outcomes.append(Outcome(name, **rates))
    return tuple(outcomes)
