"""Summaries of a table of trials: rates with intervals, means with deviations, and paired comparisons.

- success: trials in which most of the adversary's inputs are answered as wanted, of n trials, with the Wilson
  interval. The trial is the unit: inputs of one trial share a model and are not independent.
- success by target: the mean over targets of the share of their trials that succeed, with Student's interval.
  Trials of one target share a poison and are not independent; targets are.
- success rate: the share of the adversary's test inputs that are answered as wanted; mean and deviation.
- margin: by how much the greatest logit of the classes that the adversary does not want exceeds the greatest
  one of those wanted, mean over the inputs of a trial; mean and deviation over trials.
- clean accuracy: the share of clean test images predicted correctly; mean and deviation over trials.
- accuracy by class, and of the worst one: all trials together.
- observed: trials with an answer to trace, of those with a detector; where the attack failed there is none,
  and nothing is flagged.
- found: trials in which the detector's verdict is that there is poison, of those with a verdict.
- average precision: mean and deviation over the trials in which there was something to rank by.
- true positives: poisoned examples flagged, of all poisoned examples (recall), all trials together.
- precision: flagged examples that are poison, of all flagged.
- false positives: clean examples flagged, of all clean examples.
- dropped: training examples that a defense no longer used in the last epoch, of all, all trials together;
  drop precision: the share of them that is poison; drop recall: the share of the poison that was dropped.
- repaired: repairs that ended with the answer gone and a last trace that found nothing; last trace empty:
  those whose last trace found nothing; rounds: how often they healed, mean and deviation; removed: what they
  removed in all rounds, as the share of the poison that it held (removed recall) and the share of it that
  was poison (removed precision).
- noise score: mean and deviation over trials of the Gaussian Unlearning Score, where the poison is such
  noise; noise remembered: the noisy images that the model still correlates with, 1 % of which are by chance.
- screened: by test-time detectors, all trials together: the share of the triggered inputs that are flagged
  (true) and of the clean ones (false) at false-positive rates of .01 and .05 of their calibration; the area
  under the ROC curve of triggered against clean inputs, mean and deviation over trials. Triggered are those
  that are answered as the adversary wants.
- certified: of votes with certificates, the share of the test images that are predicted rightly whatever 0,
  1, 2, ... training examples are inserted, removed or labelled otherwise; all trials together.
- filter bias: the largest difference between two classes in the share of clean examples flagged, all trials
  together; 0 when every class loses alike.

Deviations are of the sample (n - 1). This module does not import torch.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import NormalDist
from typing import Any, Self, final

import numpy as np

from unpoison._statistics import Proportion
from unpoison.errors import InputError
from unpoison.evaluation._results import Results

Row = Mapping[str, Any]
METHOD = ("attack", "budget", "victim", "defense", "detector", "unlearner", "control")
"""The columns that say what was done; trials that agree in them are one line of the leaderboard."""
TARGET = ("source", "target", "test_indices")
"""The columns that say what the attack aimed at."""
_OF_SCREENING = (
    "screened_true_01",
    "screened_true_05",
    "screened_false_01",
    "screened_false_05",
    "screened_auroc",
)
_OF_REPAIRS = ("repaired", "last_trace_empty", "rounds", "removed_recall", "removed_precision")
SUBJECT = (*TARGET, "seed", "number", "observation")
"""The columns that say on what; two lines are compared on trials that agree in these."""


@final
@dataclass(frozen=True)
class Mean:
    """Mean and standard deviation of n values.

    >>> print(Mean.of([0.5, 0.75]))
    62.5 ± 17.7 % (n = 2)
    """

    mean: float
    deviation: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Self:
        """Of the values that are numbers; NaN where there are too few."""
        known = [float(value) for value in values if value is not None and math.isfinite(value)]
        return cls(
            statistics.fmean(known) if known else math.nan,
            statistics.stdev(known) if len(known) > 1 else math.nan,
            len(known),
        )

    def interval(self, level: float = 0.95) -> tuple[float, float] | None:
        """Student's interval of the mean of independent values; None for fewer than two, or without spread.

        >>> [round(bound, 3) for bound in Mean.of([0.0, 0.5, 1.0]).interval()]
        [-0.742, 1.742]
        """
        if self.n < 2 or not self.deviation > 0:
            return None
        from scipy.stats import t as student  # type: ignore[import-untyped]

        half = float(student.ppf(0.5 + level / 2, self.n - 1)) * self.deviation / math.sqrt(self.n)
        return self.mean - half, self.mean + half

    def to_dict(self) -> dict[str, Any]:
        """For JSON; what is not known is None."""
        return {
            "mean": self.mean if self.n else None,
            "deviation": self.deviation if self.n > 1 else None,
            "n": self.n,
        }

    def __str__(self) -> str:
        deviation = f" ± {100 * self.deviation:.1f}" if self.n > 1 else ""
        return f"{100 * self.mean:.1f}{deviation} % (n = {self.n})" if self.n else "- (n = 0)"


@final
@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the leaderboard: the trials of one combination of methods; the module says what is what.

    Arguments:
        rows: its trials.
        seconds: the mean of each stage.
        peak_bytes: the highest of all stages of all trials.
    """

    attack: str
    budget: float
    victim: str
    defense: str
    detector: str
    unlearner: str
    control: str
    rows: tuple[Row, ...]
    success: Proportion
    success_by_target: Mean
    success_rate: Mean
    margin: Mean
    clean_accuracy: Mean
    per_class: Mapping[str, Proportion]
    observed: Proportion
    found: Proportion
    true_positives: Proportion
    precision: Proportion
    false_positives: Proportion
    average_precision: Mean
    filter_bias: float | None
    dropped: Proportion
    drop_precision: Proportion
    drop_recall: Proportion
    repaired: Proportion
    last_trace_empty: Proportion
    rounds: Mean
    removed_recall: Proportion
    removed_precision: Proportion
    noise_score: Mean
    noise_remembered: Proportion
    screened_true_01: Proportion
    screened_true_05: Proportion
    screened_false_01: Proportion
    screened_false_05: Proportion
    screened_auroc: Mean
    certified: tuple[Proportion, ...]
    seconds: Mapping[str, float]
    peak_bytes: float

    @property
    def worst_class(self) -> tuple[str, Proportion]:
        """The class of the lowest accuracy, of those that occur in the test set."""
        known = [entry for entry in self.per_class.items() if entry[1].trials]
        return min(known, key=lambda entry: entry[1].rate, default=("-", Proportion(0, 0)))

    @property
    def target_interval(self) -> tuple[float, float] | None:
        """The interval of `success_by_target`, within [0, 1]."""
        interval = self.success_by_target.interval()
        return None if interval is None else (max(interval[0], 0.0), min(interval[1], 1.0))

    @property
    def n(self) -> int:
        """How many trials."""
        return len(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without the trials; costs are separate, under `costs`."""
        summaries: dict[str, dict[str, Any]] = {
            one.name: value.to_dict()
            for one in fields(self)
            if isinstance(value := getattr(self, one.name), Proportion | Mean)
            and (self.dropped.trials or not one.name.startswith("drop"))
            and (self.repaired.trials or one.name not in _OF_REPAIRS)
            and (self.noise_remembered.trials or not one.name.startswith("noise"))
            and (self.screened_false_01.trials or one.name not in _OF_SCREENING)
        }
        summaries["success_by_target"]["interval"] = self.target_interval
        seconds = {name: round(value, 3) for name, value in self.seconds.items()}
        return {
            **{name: getattr(self, name) for name in METHOD},
            "n": self.n,
            **summaries,
            **({"certified": [one.to_dict() for one in self.certified]} if self.certified else {}),
            "per_class": {name: share.to_dict() for name, share in self.per_class.items()},
            "filter_bias": self.filter_bias,
            "costs": {"seconds": seconds, "peak_bytes": self.peak_bytes},
        }


def leaderboard(results: Results) -> tuple[Line, ...]:
    """The lines of a table, in the order in which the recipe names them."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in results.table.to_pylist():
        groups[tuple(row[name] for name in METHOD)].append(row)
    return tuple(
        _line(dict(zip(METHOD, method, strict=True)), tuple(rows)) for method, rows in groups.items()
    )


def succeeded(row: Row) -> bool:
    """Whether the trial's attack, if it has one, succeeded: on most of its inputs, or on its only one."""
    return 2 * int(row["attack_successes"] or 0) > int(row["attack_total"] or 0)


def success_rate(row: Row) -> float:
    """The share of the adversary's inputs that are answered as they want."""
    return float(row["attack_successes"] / row["attack_total"]) if row["attack_total"] else math.nan


def clean_accuracy(row: Row) -> float:
    """The share of clean test images answered rightly."""
    return float(row["clean_correct"] / row["clean_total"]) if row["clean_total"] else math.nan


def _values(row: Row, names: Sequence[str]) -> tuple[Any, ...]:
    return tuple(tuple(row[name]) if isinstance(row[name], list) else row[name] for name in names)


def _by_target(values: Iterable[tuple[Row, float]]) -> Mean:
    """Over targets, of the means of their trials."""
    groups: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for row, value in values:
        groups[_values(row, TARGET)].append(value)
    return Mean.of(statistics.fmean(group) for group in groups.values())


def _line(method: Mapping[str, Any], rows: tuple[Row, ...]) -> Line:
    attacked = [row for row in rows if row["attack_total"]]
    judged = [row for row in rows if row["flagged"] is not None]
    defended = [row for row in rows if row.get("dropped") is not None]
    repairs = [row for row in rows if row.get("outcome") is not None]
    noisy = [row for row in rows if row.get("noise_total") is not None]
    screened = [row for row in rows if row.get("screened_clean") is not None]

    def known(column: str) -> list[Any]:
        return [row[column] for row in rows if row[column] is not None]

    def share(part: str, whole: str, among: Sequence[Row] = judged) -> Proportion:
        return Proportion(sum(row[part] for row in among), sum(row[whole] for row in among))

    accuracies = map(Proportion, _sums(rows, "class_correct"), _sums(rows, "class_total"))
    flagged = zip(_sums(judged, "class_false_positives"), _sums(judged, "class_clean"), strict=True)
    lost = [false_positives / clean for false_positives, clean in flagged if clean]
    stages = {
        name: known(f"seconds_{name}") for name in ("craft", "train", "calibrate", "find", "screen", "heal")
    }
    return Line(
        **method,
        rows=rows,
        success=Proportion(sum(map(succeeded, attacked)), len(attacked)),
        success_by_target=_by_target((row, succeeded(row)) for row in attacked),
        success_rate=Mean.of(map(success_rate, attacked)),
        margin=Mean.of(row["margin"] for row in attacked),
        clean_accuracy=Mean.of(map(clean_accuracy, rows)),
        per_class=dict(zip(rows[0]["class_names"] or [], accuracies, strict=True)),
        observed=Proportion(sum(known("observed")), len(known("observed"))),
        found=Proportion(sum(known("found")), len(known("found"))),
        true_positives=share("true_positives", "poisons"),
        precision=share("true_positives", "flagged"),
        false_positives=share("false_positives", "clean_examples"),
        average_precision=Mean.of(
            row["average_precision"] for row in judged if row["observed"] is None or row["observed"]
        ),
        filter_bias=max(lost) - min(lost) if lost else None,
        dropped=share("dropped", "examples", defended),
        drop_precision=share("dropped_poisons", "dropped", defended),
        drop_recall=share("dropped_poisons", "poisons", defended),
        repaired=Proportion(sum(row["outcome"] == "repaired" for row in repairs), len(repairs)),
        last_trace_empty=Proportion(sum(row["outcome"] != "poison remains" for row in repairs), len(repairs)),
        rounds=Mean.of(row["rounds"] for row in repairs),
        removed_recall=share("removed_poisons", "poisons", repairs),
        removed_precision=share("removed_poisons", "removed", repairs),
        noise_score=Mean.of(row["noise_score"] for row in noisy),
        noise_remembered=share("noise_remembered", "noise_total", noisy),
        screened_true_01=share("screened_true_01", "screened_triggered", screened),
        screened_true_05=share("screened_true_05", "screened_triggered", screened),
        screened_false_01=share("screened_false_01", "screened_clean", screened),
        screened_false_05=share("screened_false_05", "screened_clean", screened),
        screened_auroc=Mean.of(row["screened_auroc"] for row in screened),
        certified=_certified([row for row in rows if row.get("certified")]),
        seconds={name: statistics.fmean(values) for name, values in stages.items() if values},
        peak_bytes=max(known("peak_bytes"), default=0.0),
    )


def _certified(rows: Sequence[Row]) -> tuple[Proportion, ...]:
    """The curve of all trials together; a trial whose curve has ended counts for none."""
    total = sum(row["clean_total"] for row in rows)
    curves = itertools.zip_longest(*(row["certified"] for row in rows), fillvalue=0)
    return tuple(Proportion(sum(counts), total) for counts in curves)


def _sums(rows: Sequence[Row], name: str) -> list[int]:
    lists = [row[name] for row in rows if row[name]]
    return [sum(entries) for entries in zip(*lists, strict=True)]


@final
@dataclass(frozen=True)
class Comparison:
    """Two methods on the same trials: the first minus the second.

    Arguments:
        n: trials that both have.
        success: difference in the share of trials in which the attack succeeds, with the score interval of
            Tango.
        success_by_target: mean over targets of the differences in that share.
        accuracy: difference in mean clean accuracy, with a bootstrap interval over trials.
        success_rate: difference in mean attack success rate, likewise.
    """

    n: int
    success: tuple[float, float, float]
    success_by_target: Mean
    accuracy: tuple[float, float, float]
    success_rate: tuple[float, float, float]


def compare(first: Line, second: Line, *, level: float = 0.95, seed: int = 0) -> Comparison:
    """The differences of the first line from the second, on the trials that both have.

    Trials of two methods that agree in target and seed share the poison and mostly the victim, so their
    difference is known better than either. The lines may also be of two attacks or two kinds of victims.

    Raises:
        InputError: they have no trial in common.
    """
    others = {_values(row, SUBJECT): row for row in second.rows}
    pairs = [(row, others[subject]) for row in first.rows if (subject := _values(row, SUBJECT)) in others]
    if not pairs:
        raise InputError(
            f"compare: {first.defense}, {first.detector}, {first.unlearner} and "
            f"{second.defense}, {second.detector}, {second.unlearner} have no trial in common"
        )
    only_first = sum(succeeded(a) and not succeeded(b) for a, b in pairs)
    only_second = sum(succeeded(b) and not succeeded(a) for a, b in pairs)
    return Comparison(
        len(pairs),
        tango(only_first, only_second, len(pairs), level=level),
        _by_target((a, succeeded(a) - succeeded(b)) for a, b in pairs),
        bootstrap([clean_accuracy(a) - clean_accuracy(b) for a, b in pairs], level=level, seed=seed),
        bootstrap([success_rate(a) - success_rate(b) for a, b in pairs], level=level, seed=seed),
    )


def tango(only_first: int, only_second: int, n: int, *, level: float = 0.95) -> tuple[float, float, float]:
    """Difference of two paired proportions and its score interval (Tango 1998, Statistics in Medicine 17).

    Arguments:
        only_first: pairs in which the first alone succeeded.
        only_second: pairs in which the second alone did.
        n: all pairs.
        level: of the interval.

    Returns:
        The difference, its lower and its upper bound, in [-1, 1].

    >>> [round(value, 4) for value in tango(12, 2, 68)]
    [0.1471, 0.0453, 0.2608]
    """
    difference = (only_first - only_second) / n
    z = NormalDist().inv_cdf(0.5 + level / 2)

    def score(delta: float) -> float:
        # q is the restricted estimate of the share of pairs in which the second alone succeeds.
        b = -only_first - only_second + (2 * n - only_first + only_second) * delta
        c = -only_second * delta * (1 - delta)
        q = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)
        variance = n * (2 * q + delta * (1 - delta))
        excess = only_first - only_second - n * delta
        return excess / math.sqrt(variance) if variance > 1e-12 else math.copysign(math.inf, excess or 1.0)

    def bound(outside: float, wanted: float) -> float:
        inside = difference
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if abs(score(middle)) <= wanted else (inside, middle)
        return inside

    return difference, bound(-1.0, z), bound(1.0, z)


def bootstrap(
    differences: Sequence[float], *, level: float = 0.95, seed: int = 0, samples: int = 2000
) -> tuple[float, float, float]:
    """Mean difference and its percentile bootstrap interval over trials (Efron 1979).

    >>> bootstrap([0.5, 0.5, 0.5])
    (0.5, 0.5, 0.5)
    """
    values = np.asarray(differences, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(len(values), size=(samples, len(values)))
    low, high = np.quantile(values[draws].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(values.mean()), float(low), float(high)
