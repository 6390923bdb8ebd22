"""`Calibration`: what honest errors of a network look like to the tracer; kept, and reused for every answer.

It depends on the model, the training set and the labelled examples alone, not on the answer that is traced.

1. errors      inputs that the model classifies wrongly, up to 300, each asked about its own wrong answer;
               where they are fewer than a tenth more than the level takes, near-errors: correct answers with
               the smallest lead, asked about the second likeliest label.
2. baseline inputs  for each label 8 correct answers, asked about it, and the 8 inputs of other classes that
               are classified correctly with the likeliest answer of that label, asked about it.
3. pass        over the training set, label by label: the collapses of the examples with the label for the
               inputs that are asked about it (`_collapse`), and from them the baseline, the excess and the
               statistic of each error (`_conformal`).

Without labelled held-out examples the training set stands in for them: its errors and near-errors, and of the
baseline inputs those of other classes only, because correct answers of a label may be poison themselves.

Cost: a forward pass over the labelled examples, one gradient for each error and baseline input, one pass over
the training set with per-example gradients, each multiplied with the queries of its own label (over a label
whose queries take more than 1 GiB, a pass for each GiB), and, where groups are not known, what
`_near_duplicates` reads of what stands out. Memory: 5 numbers a training example, some thousand thumbnails,
and those queries.
"""

from __future__ import annotations

import math
import os
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unpoison._artefacts import atomic_directory, canonical_json, digest, read_record, write_json
from unpoison._inputs import count_of, rows_of
from unpoison._seeds import generator
from unpoison.data import Examples
from unpoison.data import Inputs as Given
from unpoison.detectors._answers import answers_to
from unpoison.detectors._collapse import LabelCollapse, normalised, queries_at_a_time, queries_of
from unpoison.detectors._conformal import (
    RESPONSIBLE,
    Baseline,
    errors_needed,
    least_level,
    p_value,
    responsible,
    statistic,
)
from unpoison.detectors._near_duplicates import NearDuplicates, group_numbers
from unpoison.detectors._search import Search
from unpoison.detectors._shared_pattern import Patterns, reduced
from unpoison.errors import InputError
from unpoison.influence import Factors, model_fingerprint

_FORMAT: Final = 4
_ERRORS: Final = 300
"""How many errors are calibrated on at most, where the level takes no more: a bound of the cost."""
_BASELINE: Final = 8
"""Baseline inputs of each kind for a label. Chosen on the development networks of `_decision`; with 4 of each
power falls from .872 to .833 at level .01."""
_RESERVE: Final = 1.1
"""Errors, relative to what the level takes, as those that are among the observed inputs do not count."""
_KEPT: Final = 128
"""How many responsible examples of each error are kept, to find a pattern that they share."""


@final
@dataclass(frozen=True)
class Rank:
    """A p-value, and whether a pattern is carried."""

    p_value: float
    carried: bool = False


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Calibration:
    """Calibration errors of a model on a training set, and the baseline of every training example.

    Arguments:
        key: equal for equal calls of `calibrate`, see `key_of`.
        factors: of the influence engine, which know the model and the training set.
        damping: of the curvature, as text.
        held_out: whether the errors are of held-out examples, or of the training set.
        errors: how many of the m calibration errors are errors; the rest are near-errors.
        answers: Int64[m], the label that each was asked about.
        statistics: Float64[m].
        responsible: Int64[m k], the training examples that stand out most for each.
        weights: Float64[m k], how far; 0 for none.
        images: m digests of the inputs.
        inputs: Float32[m d], these as `_shared_pattern` reduces them.
        centre: Float64[n], the baseline of every training example.
        spread: Float64[n], its spread.
        near: how many near-duplicates the training examples have, as far as this is known.
        index: the digest of the index that the influences were read from; None where they are exact.
        artifacts: `artifact_features` by label, of the labels that were asked about; they are not saved.
        carried: of the errors for which it is known, by their place, whether they carry a pattern that what
            stands out for them shares; not saved.
    """

    key: str
    factors: Factors
    damping: str
    held_out: bool
    errors: int
    answers: Tensor
    statistics: Tensor
    responsible: Tensor
    weights: Tensor
    images: tuple[str, ...]
    inputs: Tensor
    centre: Tensor
    spread: Tensor
    near: NearDuplicates
    index: str | None = None
    artifacts: dict[int, Tensor] = field(default_factory=dict, init=False)
    carried: dict[int, bool] = field(default_factory=dict, init=False)

    def __len__(self) -> int:
        """How many calibration errors there are."""
        return len(self.statistics)

    @property
    def source(self) -> str:
        """What the errors are, in words."""
        near = f" and {len(self) - self.errors} near-errors" if self.errors < len(self) else ""
        where = (
            "on held-out examples" if self.held_out else "on the training set, which the level hardly fits"
        )
        return f"{self.errors} errors{near} {where}"

    def excess(self, collapses: Tensor, rows: Tensor) -> Tensor:
        """Float64[... k], stage 1 of `_conformal`, of the training examples Int64[k] `rows` of one label."""
        return Baseline(self.centre[rows], self.spread[rows]).excess(collapses)

    def statistic(self, training_set: Examples, excess: Tensor, rows: Tensor) -> Tensor:
        """Float64[...], stage 2 of `_conformal`, of Float64[... k] excess of the examples Int64[k] `rows`."""
        return _statistic(training_set, self.near, excess, rows)

    def p_value(
        self,
        value: float,
        excess: Tensor,
        rows: Tensor,
        answer: int,
        inputs: Given,
        *,
        patterns: Patterns | None = None,
        level: float = 1.0,
    ) -> Rank:
        """The rank of an observation.

        Arguments:
            value: its statistic.
            excess: Float64[k] of the training examples with the answered label.
            rows: Int64[k], which these are.
            answer: their label.
            inputs: those observed, which are no calibration errors of their own.
            patterns: of the training set; no pattern is looked for by default.
            level: where nothing is carried, and the rank of the statistic is above it, that is the p-value.
        """
        images = set(input_digests(inputs))
        other = torch.tensor([image not in images for image in self.images], dtype=torch.bool)
        above = self.statistics >= value
        if patterns is None:
            return Rank(self._rank(above, other))
        places, weights = responsible(excess[None], _KEPT)
        carried = patterns.carried(answer, reduced(inputs), rows[places[0]], weights[0])
        if carried:  # above all that do not
            above &= self._carried(above & other, patterns)
        elif self._rank(above, other) <= level + 1e-9:
            above |= self._carried(~above & other, patterns)
        return Rank(self._rank(above, other), carried)

    def _rank(self, above: Tensor, other: Tensor) -> float:
        """The p-value, of Bool[m] errors that rank at least as high and Bool[m] which of them count."""
        found, errors = p_value(above[other]), other.clone()
        errors[self.errors :] = False
        # Near-errors only say how far a statistic lies beyond those of all errors.
        return max(found, p_value(above[errors])) if bool(above[errors].any()) else found

    def _carried(self, asked: Tensor, patterns: Patterns) -> Tensor:
        """Bool[m]: which of the Bool[m] errors carry a pattern."""
        found = torch.zeros_like(asked)
        places = asked.nonzero()[:, 0]
        for place in places[self.answers[places].argsort(stable=True)].tolist():
            if place not in self.carried:
                self.carried[place] = patterns.carried(
                    int(self.answers[place]),
                    self.inputs[place][None],
                    self.responsible[place],
                    self.weights[place],
                )
            found[place] = self.carried[place]
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as a directory, in one step."""
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        tensors |= {name: getattr(self.near, name).contiguous() for name in _NEAR}
        if self.near.groups is not None:
            tensors["groups"] = self.near.groups.contiguous()
        record = {"format": _FORMAT, **{name: getattr(self, name) for name in _RECORD}}
        with atomic_directory(path) as staging:
            self.factors.save(staging / "factors")
            save_file(tensors, staging / "calibration.safetensors")
            write_json(staging / "calibration.json", record)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read one that `save` wrote.

        Raises:
            InputError: the directory does not hold a calibration, or it is damaged.
        """
        record = read_record(Path(path) / "calibration.json", _FORMAT, "calibrations")
        try:
            tensors = load_file(Path(path) / "calibration.safetensors")
            return cls(
                key=record["key"],
                factors=Factors.load(Path(path) / "factors"),
                damping=record["damping"],
                held_out=record["held_out"],
                errors=record["errors"],
                images=tuple(record["images"]),
                index=record.get("index"),
                near=NearDuplicates(**{name: tensors[name] for name in _NEAR}, groups=tensors.get("groups")),
                **{name: tensors[name] for name in _TENSORS},
            )
        except (OSError, KeyError, TypeError, SafetensorError) as error:
            raise InputError(f"{path}: damaged calibration ({error}); calibrate anew") from None


_RECORD: Final = ("key", "damping", "held_out", "errors", "images", "index")
_TENSORS: Final = (
    "answers",
    "inputs",
    "statistics",
    "responsible",
    "weights",
    "centre",
    "spread",
)
_NEAR: Final = ("multiplicities", "spacings", "drawn", "compared")


@final
@dataclass(frozen=True, eq=False)
class Inputs:
    """Rows of the labelled examples and the labels that they are asked about.

    Arguments:
        rows: Int64[m], the calibration errors.
        answers: Int64[m].
        errors: how many of them are errors, which come first.
        baseline: for each label, Int64[b].
    """

    rows: Tensor
    answers: Tensor
    errors: int
    baseline: Sequence[Tensor]


def choose(source: Examples, logits: Tensor, *, held_out: bool, level: float, seed: int) -> Inputs:
    """Stages 1 and 2.

    Arguments:
        source: the labelled examples.
        logits: Float[n classes], the model's.
        held_out: whether the model was not trained on them.
        level: the false-alarm level that the p-value is to reach.
        seed: of the choice.

    Raises:
        InputError: there are too few for the level.
    """
    labels, wanted = source.labels.cpu(), errors_needed(level)
    enough = math.ceil(_RESERVE * wanted)
    answered = logits.argmax(1)
    right = answered == labels
    randomness = generator(seed, "calibration")
    # Of more logits than classes only those of classes can be traced.
    traceable = ~right & (answered < source.num_classes)
    wrong = shuffled(traceable.nonzero()[:, 0], randomness)[: max(_ERRORS, enough)]
    correct = right.nonzero()[:, 0]
    two = logits[correct, : source.num_classes].topk(2, 1)
    order = (two.values[:, 0] - two.values[:, 1]).argsort(stable=True)[: max(0, enough - len(wrong))]
    rows = torch.cat([wrong, correct[order]])
    if len(rows) < wanted:
        advice = f"raise the level to {least_level(len(rows)):g} or give" if len(rows) else "give"
        raise InputError(
            f"{source.name}: a false-alarm level of {level:g} takes {wanted} labelled examples, there are "
            f"{len(rows)}; {advice} a larger reference"
        )
    answers = torch.cat([answered[wrong], two.indices[order, 1]])
    lead = logits[correct] - logits[correct].amax(1, keepdim=True)
    baseline = []
    for label in range(source.num_classes):
        own = shuffled(correct[labels[correct] == label], randomness)[: _BASELINE if held_out else 0]
        others = (labels[correct] != label).nonzero()[:, 0]
        nearest = others[lead[others, label].argsort(descending=True, stable=True)[:_BASELINE]]
        baseline.append(torch.cat([own, correct[nearest]]))
    return Inputs(rows, answers, len(wrong), baseline)


def calibrate(
    search: Search, source: Examples, inputs: Inputs, key: str, groups: Tensor | None
) -> Calibration:
    """Stage 3; `inputs` are rows of `source`, key and groups those of `key_of`."""
    training_set = search.training_set
    labels, count = training_set.labels.cpu(), len(inputs.rows)
    near = NearDuplicates.of(training_set, groups)
    centre, spread = torch.zeros(2, len(labels), dtype=torch.float64)
    spread += 1
    statistics = torch.zeros(count, dtype=torch.float64)
    places = torch.zeros(count, _KEPT, dtype=torch.int64)
    weights = torch.zeros(count, _KEPT, dtype=torch.float64)
    search.lap("near-duplicates")
    done = 0
    for label in range(training_set.num_classes):
        rows = (labels == label).nonzero()[:, 0]
        if not len(rows):
            continue
        asked = (inputs.answers == label).nonzero()[:, 0]
        first = inputs.baseline[label]
        given = source.at(torch.cat([first, inputs.rows[asked]]))[0]
        collapses = in_label(search, given, label, rows)
        baseline = Baseline.of(collapses[: len(first)])
        centre[rows], spread[rows] = baseline.centre, baseline.spread
        excess = baseline.excess(collapses[len(first) :])
        search.lap("calibration")
        statistics[asked] = _statistic(training_set, near, excess, rows)
        search.lap("near-duplicates")
        top, height = responsible(excess, _KEPT)
        places[asked, : top.shape[1]], weights[asked, : top.shape[1]] = rows[top], height
        done += len(rows)
        if search.progress is not None:
            search.progress("calibration", done, len(labels))
    search.lap("calibration")
    given = source.at(inputs.rows)[0]
    return Calibration(
        key=key,
        factors=search.factors,
        damping=repr(search.damping),
        held_out=search.reference is not None,
        errors=inputs.errors,
        answers=inputs.answers,
        statistics=statistics,
        responsible=places,
        weights=weights,
        images=tuple(input_digests(given)),
        inputs=reduced(given),
        centre=centre,
        spread=spread,
        near=near,
        index=None if search.index is None else search.index.digest,
    )


def key_of(search: Search, groups: Sequence[Hashable] | Tensor | None) -> tuple[str, Tensor | None]:
    """A digest of the model, the examples, the groups and the settings but the level; and the groups."""
    count, reference = len(search.training_set), search.reference
    numbers = None if groups is None else group_numbers(groups, count)
    settings = {**search.settings, "seed": search.seed}
    if search.index is not None:
        settings["index"] = search.index.digest
    settings.pop("false_alarm_level")
    key = digest(
        model_fingerprint(search.model),
        search.training_set.fingerprint,
        "" if reference is None else reference.fingerprint,
        b"" if numbers is None else numbers.numpy().tobytes(),
        canonical_json(settings),
    )
    return key, numbers


def in_label(search: Search, inputs: Given, label: int, rows: Tensor) -> Tensor:
    """Float64[q k]: the normalised collapses of the training examples at Int64[k] for each of q inputs."""
    if not count_of(inputs):
        return torch.zeros(0, len(rows), dtype=torch.float64)
    task = LabelCollapse()
    return torch.cat(
        [
            normalised(search, queries_of(search, part, label, task), rows)
            for part in _parts(inputs, queries_at_a_time(search))
        ]
    )


def queries_of_a_label(classes: int) -> int:
    """How many inputs are asked about a label, where errors are spread evenly."""
    return 2 * _BASELINE + -(-_ERRORS // max(classes, 1))


def chosen_inputs(search: Search, source: Examples, level: float) -> Inputs:
    """Stages 1 and 2, from the model's answers."""
    logits = answers_to(search.model, source)
    inputs = choose(source, logits, held_out=search.reference is not None, level=level, seed=search.seed)
    search.lap("calibration inputs")
    return inputs


def input_digests(inputs: Given) -> list[str]:
    """A digest of each of m inputs."""
    tensors = [inputs] if isinstance(inputs, Tensor) else list(inputs.values())
    return [
        digest(*(part[row].cpu().contiguous().numpy().tobytes() for part in tensors))
        for row in range(count_of(inputs))
    ]


def _statistic(training_set: Examples, near: NearDuplicates, excess: Tensor, rows: Tensor) -> Tensor:
    """Stage 2 of `_conformal`; near-duplicates are measured of what stands out."""
    near.measure(training_set, rows[(excess > RESPONSIBLE).reshape(-1, len(rows)).any(0)])
    return statistic(excess, near.multiplicities[rows])


def _parts(inputs: Given, size: int) -> Iterator[Given]:
    return (rows_of(inputs, slice(start, start + size)) for start in range(0, count_of(inputs), size))


def shuffled(rows: Tensor, randomness: torch.Generator) -> Tensor:
    """The rows in a random order."""
    return rows[torch.randperm(len(rows), generator=randomness)]
