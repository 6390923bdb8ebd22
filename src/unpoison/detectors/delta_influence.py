"""Delta-Influence: from one wrong prediction to the training examples that caused it.

Li, Li, Zeng, Schroeder de Witt, Prabhu and Sanyal, "Delta-Influence: Unlearning Poisons via Influence
Functions" (arXiv 2411.13731; TMLR 2026). An input that a poisoned model answers wrongly owes its label to the
poison; change the input and ask about another label, and the influence of the poison collapses while that of
other examples does not. Stages:

I    influence   `s_0[j]`: of every training example j on the margin of the wrong label y at the suspect x, by
                 EK-FAC.
II   draws       n times: one of seven image transformations, and another label: `(x_i, y_i) = g_i(x, y)`.
III  collapse    `D_i[j] = s_i[j] - s_0[j]`. The difference of the two measurement gradients is formed before
                 the product with the training gradients, so all n + 1 scores cost one pass over the training
                 set.
IV   decision    a rule turns the D into flags: `Votes`, as published, or `NullDistribution`, ours.

Presets (`DeltaInfluence.preset`): `published`, `published-smooth` and `published-matching` are the three
settings of the reference experiments (their thresholds differ because they were tuned for each attack);
`calibrated` is ours and has nothing to tune: relative damping; collapses divided by the example's own
self-influence, so that a few examples with huge gradients do not drown the rest; and a decision against
innocent inputs, which says "no poison found" when the prediction is wrong for no other reason than being
hard. From what it is sure of it then finds the rest: by company (`_company`), since poison that shares a
cause shares a gradient direction, in the metric of the curvature; or, where poison was tuned image by image
and has little company, by what tuned images look like (`_looks`). Company also decides where the innocent
inputs leave doubt, for some of them may blame the same poison: if what is blamed most is a group of its own
within its class, it is poison.

Cost: two passes over the training set for the factors (they can be reused), one for the scores; `calibrated`
takes one more where it found poison, one over the examples with the answered label where it is in doubt, and
three forward passes of one class. Memory: the queries, n + 1 numbers a tracked parameter (the null
distribution adds one for each innocent input), beside what `unpoison.influence` states. Limits: it must be
one cause that the flagged share; a poison that made a single training example decisive cannot be told from an
ordinary hard example.
"""

from __future__ import annotations

import math
import time
from abc import ABC
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from unpoison._memory import peak_bytes
from unpoison._progress import Progress
from unpoison._seeds import derive_seed, generator
from unpoison.data import TrainingSet
from unpoison.detectors._company import company
from unpoison.detectors._detector import Detector
from unpoison.detectors._findings import Draw, Findings, Threshold
from unpoison.detectors._looks import looks
from unpoison.detectors._methods import register
from unpoison.detectors._null_distribution import compare
from unpoison.detectors._observation import Observation
from unpoison.detectors._transforms import TRANSFORMS
from unpoison.errors import InputError
from unpoison.influence import (
    AbsoluteDamping,
    ClassificationTask,
    Damping,
    Factors,
    RelativeDamping,
    fit_factors,
    precondition,
    score,
)
from unpoison.registry import Presets
from unpoison.training import predict

Labels = Literal["uniform", "distinct"]
Space = Literal["pixels", "normalized"]

_DAMPING = RelativeDamping(0.1)
# An answer is in doubt that looks as guilty as so many innocent inputs,
_DOUBT = 0.5
# and then so many examples are asked for company: those with its label that are blamed most.
_ASKED = 10
# The share of those who look alike that must not pull the same way, for the looks to decide.
_APART = 0.25


class Rule(ABC):  # noqa: B024 (what a rule needs to see differs from one to the next)
    """How collapses become flags."""


@final
@dataclass(frozen=True)
class Votes(Rule):
    """The published rule: flag j when `D_i[j] < threshold` in at least n - tolerance of the n draws.

    Arguments:
        threshold: 0, or below, in the unit of the influence scores.
        tolerance: draws that may fail.
    """

    threshold: float = 0.0
    tolerance: int = 2


@final
@dataclass(frozen=True)
class NullDistribution(Rule):
    """Our rule: flag what is blamed for the suspect and not for innocent inputs; see `_null_distribution`.

    Innocent inputs are examples of other classes that the model gets right, those nearest to the suspect's
    label first, each asked about as if it had been given that label: what a natural error on it would look
    like.

    Arguments:
        false_alarm_level: the probability that a wrong prediction without poison is called poisoned, by its
            rank among 2 / level - 1 innocent inputs (at least 3), all of which the suspect must beat. Where
            it beats some, and those that it blames most are a group of their own among the examples of its
            label, it is called poisoned as well: no theory bounds how often that adds a false alarm
            (`benchmarks.false_alarms` counts them).
        false_discoveries: the share of what is blamed most that may be innocent, among the examples that
            bear the suspect's label; a tenth of it among the others. The rest is found from the upper half.
    """

    false_alarm_level: float = 0.01
    false_discoveries: float = 0.1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 < value < 1:
                raise InputError(f"NullDistribution: {name} must lie between 0 and 1, found {value}")

    @property
    def inputs(self) -> int:
        """How many innocent inputs the level asks for."""
        return max(3, round(2 / self.false_alarm_level) - 1)


@final
@register(
    name="delta-influence",
    title="Delta-Influence",
    summary="Flags the examples whose influence on the wrong answer collapses as that changes.",
    paper="Li et al. 2026, arXiv 2411.13731",
    cost="three passes with per-example gradients, four where poison is found",
    presets=("calibrated", "published", "published-smooth", "published-matching"),
    needs_observation=True,
    can_find_nothing=True,
    uses_reference=True,
)
@dataclass(frozen=True, kw_only=True)
class DeltaInfluence(Detector):
    """Trace one wrong prediction to the training examples that caused it.

    Arguments:
        rule: `Votes()` or `NullDistribution()`.
        draws: n, how many pairs of a transformation and a label.
        labels: how the other labels are drawn: `uniform`, independently (published for 10 classes), or
            `distinct`, without repetition while there are labels left (published for 100 classes).
        space: what the transformations work on: `pixels` in [0, 1], or, as the published code has it,
            `normalized` z-scores, to which inversion and jitter do something else.
        damping: of the curvature.
        modules: which modules' parameters to track; all Linear and Conv2d by default.
        covariance_examples: fit the covariances to this many examples only.
        batch_size: examples of a forward pass.

    >>> from unpoison import detectors
    >>> detectors.get("delta-influence", preset="published").rule
    Votes(threshold=0.0, tolerance=2)
    """

    PRESETS: ClassVar[Presets] = {
        "calibrated": {"rule": NullDistribution()},
        "published": {"rule": Votes(0.0, 2), "space": "normalized", "damping": AbsoluteDamping(1e-8)},
        "published-smooth": {
            "rule": Votes(-40.0, 0),
            "labels": "distinct",
            "space": "normalized",
            "damping": AbsoluteDamping(1e-8),
        },
        "published-matching": {
            "rule": Votes(0.0, 1),
            "space": "normalized",
            "damping": AbsoluteDamping(1e-8),
        },
    }

    rule: Rule
    draws: int = 50
    labels: Labels = "uniform"
    space: Space = "pixels"
    damping: Damping = _DAMPING
    modules: tuple[str, ...] | None = None
    covariance_examples: int | None = None
    batch_size: int = 128

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise InputError(f"DeltaInfluence: needs at least one draw, found {self.draws}")
        if isinstance(self.rule, Votes) and not 0 <= self.rule.tolerance < self.draws:
            raise InputError(
                f"Votes: the tolerance must lie between 0 and {self.draws - 1}, found {self.rule.tolerance}"
            )

    def find(
        self,
        model: nn.Module,
        training_set: TrainingSet,
        observation: Observation | None = None,
        *,
        reference: TrainingSet | None = None,
        seed: int = 0,
        progress: Progress | None = None,
        factors: Factors | None = None,
    ) -> Findings:
        """Find the examples whose influence on the observation collapses; see `Detector.find`.

        Arguments:
            factors: EK-FAC factors fitted to this model and set before; they are fitted anew by default.
        """
        observation = check_observation(model, training_set, observation)
        task, seconds = ClassificationTask(), {}
        clock = time.perf_counter()
        if factors is None:
            factors = fit_factors(
                model,
                training_set,
                task,
                seed=derive_seed(seed, "factors"),
                modules=self.modules,
                covariance_examples=self.covariance_examples,
                batch_size=self.batch_size,
                progress=progress,
            )
        else:
            factors.check(model, training_set)
        seconds["factors"] = time.perf_counter() - clock

        clock = time.perf_counter()
        suspect = self._questions(observation.images, observation.predicted, training_set, seed, "suspect")
        inputs, labels, combine = suspect.inputs, suspect.labels, suspect.every_difference()
        innocent: _Innocent | None = None
        if isinstance(self.rule, NullDistribution):
            innocent = self._innocent(model, training_set, observation, reference, self.rule)
            asked = [
                self._questions(image[None], observation.predicted, training_set, seed, f"innocent {place}")
                for place, image in enumerate(innocent.images)
            ]
            inputs = torch.cat([inputs, *(questions.inputs for questions in asked)])
            labels = torch.cat([labels, *(questions.labels for questions in asked)])
            combine = torch.block_diag(combine, *(questions.mean_difference() for questions in asked))  # type: ignore[no-untyped-call]
        queries = precondition(
            model,
            factors,
            (inputs, labels),
            task,
            combine=combine,
            damping=self.damping,
            batch_size=self.batch_size,
        )
        seconds["queries"] = time.perf_counter() - clock

        clock = time.perf_counter()
        scores = score(
            model,
            queries,
            training_set,
            task,
            self_influence=innocent is not None,
            batch_size=self.batch_size,
            progress=progress,
        )
        seconds["scores"] = time.perf_counter() - clock

        values = scores.values.cpu()
        draws = suspect.count
        before, differences = values[0], values[1 : 1 + draws]
        evidence = {
            "influence_before": before,
            "influence_after": before + differences.mean(0),
            "collapses": (differences < (self.rule.threshold if isinstance(self.rule, Votes) else 0.0))
            .sum(0)
            .float(),
        }
        findings = Findings(
            method="delta-influence",
            configuration=self.configuration() | {"seed": seed},
            fingerprint=training_set.fingerprint,
            labels=training_set.labels.cpu(),
            class_names=training_set.class_names,
            scores=before,
            flagged=torch.empty(0, dtype=torch.int64),
            threshold=Threshold(float("inf"), ""),
            poison_found=False,
            p_value=None,
            summary="",
            evidence=evidence,
            observation=observation,
            draws=suspect.draws,
            draw_images=(suspect.inputs[len(observation) :].clamp(0, 1) * 255).round().to(torch.uint8).cpu(),
        )
        if isinstance(self.rule, Votes):
            findings = _by_votes(findings, self.rule, differences)
        else:
            assert isinstance(self.rule, NullDistribution)
            assert innocent is not None
            assert scores.self_influence is not None
            own = scores.self_influence.cpu().clamp(min=0).sqrt()
            collapses = -torch.cat([differences.mean(0, keepdim=True), values[1 + draws :]])
            findings, surest = _by_null(findings, self.rule, collapses, own, innocent)
            if len(surest):
                findings = self._with_the_rest(
                    findings, model, factors, training_set, surest, seconds, progress
                )
        return replace(findings, seconds=seconds, peak_bytes=peak_bytes(values.device))

    def configuration(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return {
            "rule": {"name": type(self.rule).__name__, **asdict(self.rule)},  # type: ignore[call-overload]
            "draws": self.draws,
            "labels": self.labels,
            "space": self.space,
            "damping": {"name": type(self.damping).__name__, **asdict(self.damping)},  # type: ignore[call-overload]
            "modules": None if self.modules is None else list(self.modules),
            "covariance_examples": self.covariance_examples,
            "batch_size": self.batch_size,
        }

    def _with_the_rest(
        self,
        findings: Findings,
        model: nn.Module,
        factors: Factors,
        training_set: TrainingSet,
        surest: Tensor,
        seconds: dict[str, float],
        progress: Progress | None,
    ) -> Findings:
        """What pulls the model the same way as the surest, or, where that hardly stands out, looks like them.

        Where the answer is in doubt, only a group of its own is called poison: most of the surest must belong
        to it, and it must stand clearly apart from the others of its label.

        Poison that was tuned image by image has little company, and much of it looks as the surest do without
        pulling the same way. Where only a few look so, these are innocent.
        """
        clock = time.perf_counter()
        ask = partial(
            company, model, factors, damping=self.damping, batch_size=self.batch_size, progress=progress
        )
        if not findings.poison_found:
            assert findings.observation is not None
            assert findings.p_value is not None
            # Only those with the label decide; the others are read where there is something to tell of them.
            likely = (findings.labels == findings.observation.predicted).nonzero()[:, 0]
            places = torch.searchsorted(likely, surest)
            own = ask(training_set.subset(likely), places)
            seconds["company"] = time.perf_counter() - clock
            if not own.stands_apart or 2 * int(own.pulling[places].sum()) <= len(places):
                return findings
            doubt = f"leaves doubt (p = {findings.p_value:.3g}), but is a group of its own"
            told = replace(findings.threshold, how=f"what is {findings.threshold.how} {doubt}")
            findings = replace(findings, threshold=told)
        kept = ask(training_set, surest)
        seconds["company"] = time.perf_counter() - clock
        blamed = replace(findings, evidence={**findings.evidence, "company": kept.scores})
        how = "pull the model the same way as those, cut at the gap that parts them from other examples"
        decided = _completed(blamed, kept.scores, kept.threshold, kept.pulling, how)
        if kept.stands_apart:
            return decided

        clock = time.perf_counter()
        odds = looks(
            model,
            training_set,
            surest,
            kept.alike,
            findings.scores,
            batch_size=self.batch_size,
            progress=progress,
        )
        seconds["looks"] = time.perf_counter() - clock
        if odds is None:
            return decided
        evidence = {**blamed.evidence, "looks": odds}
        resembling = kept.alike & (odds > 0)
        if int((resembling & ~kept.pulling).sum()) <= _APART * int(resembling.sum()):
            return replace(decided, evidence=evidence)
        how = "look tuned as those do, by their grain and by what recompression and a shift do to them"
        return _completed(replace(blamed, evidence=evidence), odds, 0.0, resembling, how)

    def _questions(
        self, images: Tensor, label: int, training_set: TrainingSet, seed: int, name: str
    ) -> _Questions:
        """UInt8[m c h w] images as they are, and n draws of each."""
        randomness = generator(seed, "draws", name)
        mean, std = (torch.tensor(part)[:, None, None] for part in training_set.channel_statistics)
        pixels = images.cpu().float() / 255
        inputs, labels, draws = [pixels], [torch.full((len(images),), label)], []
        for image in pixels:
            others = _other_labels(self.labels, label, training_set.num_classes, self.draws, randomness)
            for other in others.tolist():
                transform = tuple(TRANSFORMS)[int(torch.randint(len(TRANSFORMS), (), generator=randomness))]
                if self.space == "pixels":
                    changed = TRANSFORMS[transform](image, randomness)
                else:
                    changed = TRANSFORMS[transform]((image - mean) / std, randomness) * std + mean
                inputs.append(changed[None])
                draws.append(Draw(transform, other))
            labels.append(others)
        return _Questions(torch.cat(inputs), torch.cat(labels), tuple(draws), len(images))

    def _innocent(
        self,
        model: nn.Module,
        training_set: TrainingSet,
        observation: Observation,
        reference: TrainingSet | None,
        rule: NullDistribution,
    ) -> _Innocent:
        """Inputs that the model gets right, to ask about the observation's label."""
        source = training_set if reference is None else reference
        if source.image_shape != training_set.image_shape or source.num_classes != training_set.num_classes:
            raise InputError(
                f"{source.name}: a reference needs images of shape {training_set.image_shape} in "
                f"{training_set.num_classes} classes, found {source.image_shape} in {source.num_classes}"
            )
        label = observation.predicted
        logits = predict(model, source.images).cpu()
        labels = source.labels.cpu()
        others = ((logits.argmax(1) == labels) & (labels != label)).nonzero()[:, 0]
        if len(others) < rule.inputs:
            fits = math.ceil(2000 / (len(others) + 1)) / 1000
            advice = f"raise the level to {fits} or give" if len(others) >= 3 else "give"
            raise InputError(
                f"{source.name}: a false alarm level of {rule.false_alarm_level} takes {rule.inputs} "
                "examples of other classes that the model gets right, there are "
                f"{len(others)}; {advice} a larger reference"
            )
        nearness = logits.log_softmax(1)[others, label]
        chosen = others[nearness.argsort(descending=True, stable=True)[: rule.inputs]]
        images = source.images[chosen.to(source.device)].cpu()
        return _Innocent(images, chosen if reference is None else None, reference is not None)


@final
@dataclass(frozen=True, eq=False)
class _Questions:
    """Inputs Float[q c h w] with labels: `originals` unchanged ones, then the draws of each in turn."""

    inputs: Tensor
    labels: Tensor
    draws: tuple[Draw, ...]
    originals: int

    @property
    def count(self) -> int:
        return len(self.draws)

    def every_difference(self) -> Tensor:
        """Float[1 + draws, q]: the mean of the originals, then each draw less its original."""
        own = torch.arange(self.originals).repeat_interleave(self.count // self.originals)
        combine = torch.zeros(1 + self.count, self.originals + self.count)
        combine[0, : self.originals] = 1 / self.originals
        draws = torch.arange(self.count)
        combine[1 + draws, self.originals + draws] = 1.0
        combine[1 + draws, own] = -1.0
        return combine

    def mean_difference(self) -> Tensor:
        """Float[1, q]: the mean of the draws less the mean of the originals."""
        return self.every_difference()[1:].mean(0, keepdim=True)


@final
@dataclass(frozen=True, eq=False)
class _Innocent:
    """UInt8[m c h w] innocent inputs; `indices` says which training examples they are, if they are."""

    images: Tensor
    indices: Tensor | None
    trusted: bool


def check_observation(
    model: nn.Module, training_set: TrainingSet, observation: Observation | None
) -> Observation:
    """The observation, if it is one of this model and this set.

    Raises:
        InputError: there is none, its image or label does not fit, or the model does not answer with that
            label.
    """
    if observation is None:
        raise InputError("tracing starts from an Observation; give the input that the model gets wrong")
    if not len(training_set):
        raise InputError(f"{training_set.name}: there are no training examples to trace to")
    if tuple(observation.images.shape[1:]) != training_set.image_shape:
        raise InputError(
            f"Observation: the image is of shape {tuple(observation.images.shape[1:])}, the training images "
            f"are of shape {training_set.image_shape}"
        )
    for name, label in (("predicted", observation.predicted), ("true", observation.true_label)):
        if label is not None and not 0 <= label < training_set.num_classes:
            raise InputError(
                f"Observation: {name} label {label} is outside 0..{training_set.num_classes - 1}"
            )
    logits = predict(model, observation.images)
    if logits.ndim != 2 or logits.shape[1] != training_set.num_classes:
        raise InputError(
            f"the model gives outputs of shape {tuple(logits.shape[1:])}; for {training_set.name} it must "
            f"give one logit for each of {training_set.num_classes} classes"
        )
    answers = logits.argmax(1)
    wrong = (answers != observation.predicted).nonzero()
    if len(wrong):
        answer = int(answers[wrong[0, 0]])
        raise InputError(
            f"Observation: the model answers {answer} ({training_set.class_names[answer]}) to image "
            f"{int(wrong[0, 0])}, not {observation.predicted} "
            f"({training_set.class_names[observation.predicted]}); trace the label that it gives"
        )
    return observation


def _other_labels(how: Labels, label: int, classes: int, count: int, randomness: torch.Generator) -> Tensor:
    """Int64[count] of labels that are not `label`."""
    if how == "uniform":
        drawn = torch.randint(classes - 1, (count,), generator=randomness)
    else:
        rounds = -(-count // (classes - 1))
        drawn = torch.cat([torch.randperm(classes - 1, generator=randomness) for _ in range(rounds)])[:count]
    return drawn + (drawn >= label)


def _by_votes(findings: Findings, rule: Votes, differences: Tensor) -> Findings:
    draws = len(differences)
    votes = findings.evidence["collapses"].long()
    # Ranked by votes, and among equal votes by the mean difference, squeezed into less than one vote: the
    # threshold lies half a vote below those needed, and no example on it.
    depth = -differences.mean(0).double()
    scores = votes.double() + 0.49 * depth / depth.abs().max().clamp(min=1e-300)
    needed = draws - rule.tolerance
    flagged = (votes >= needed).nonzero()[:, 0]
    flagged = flagged[scores[flagged].argsort(descending=True, stable=True)]
    return replace(
        findings,
        scores=scores,
        flagged=flagged,
        threshold=Threshold(
            needed - 0.5,
            f"influence fell by more than {0 - rule.threshold:g} in at least {needed} of {draws} draws, "
            "as published",
        ),
        poison_found=bool(len(flagged)),
        summary=_summary(findings, len(flagged))
        + ("; the published rule names examples for any prediction, poisoned or not" if len(flagged) else ""),
    )


def _by_null(
    findings: Findings, rule: NullDistribution, collapses: Tensor, own: Tensor, innocent: _Innocent
) -> tuple[Findings, Tensor]:
    """The verdict, and Int64[k] the examples it is surest of, or where it is in doubt, those blamed most.

    Influence is divided by the root of self-influence.

    `collapses` are Float[1 + m, n] of the suspect and the innocent, `own` Float[n] roots of self-influence.
    """
    length = torch.where(own > 0, own, torch.inf)
    relative = collapses / length
    relative = relative / relative.std(1, keepdim=True).clamp(min=torch.finfo(relative.dtype).tiny)
    assert findings.observation is not None
    likely = findings.labels == findings.observation.predicted
    outcome = compare(
        relative[0],
        relative[1:],
        false_discoveries=rule.false_discoveries,
        ignore=innocent.indices,
        likely=likely,
    )
    # Float division may put 1 / 100 a hair above .01.
    level = rule.false_alarm_level + 1e-9
    blamed = outcome.blamed
    if outcome.p_value_of_likely <= level and bool((blamed & likely).any()):
        # Poison bears the label: others that are blamed, too, resemble the suspect.
        blamed = blamed & likely
    found = outcome.p_value <= level and bool(blamed.any())
    ranking = outcome.excess.argsort(descending=True, stable=True)
    blamed = ranking[blamed[ranking]]
    if found:
        surest = blamed[: max(1, len(blamed) // 2)]
    elif outcome.p_value <= _DOUBT:
        surest = ranking[likely[ranking]][:_ASKED]
    else:
        surest = blamed[:0]
    where = "a trusted reference" if innocent.trusted else "the training set"
    how = f"blamed for this answer more than for {rule.inputs} innocent inputs from {where}"
    return replace(
        findings,
        scores=outcome.excess,
        threshold=Threshold(outcome.threshold, how, rule.false_alarm_level),
        poison_found=found,
        p_value=outcome.p_value,
        summary=_summary(findings, 0),
        evidence={
            # As the rule sees them: a few examples with huge gradients would hide all others.
            "influence_before": findings.evidence["influence_before"] / length,
            "influence_after": findings.evidence["influence_after"] / length,
            "collapses": findings.evidence["collapses"],
            "relative_collapse": relative[0],
            "excess": outcome.excess,
        },
    ), surest


def _completed(findings: Findings, scores: Tensor, threshold: float, chosen: Tensor, how: str) -> Findings:
    """The findings with all of Bool[n] `chosen` flagged, the highest of Float[n] `scores` first."""
    flagged = chosen.nonzero()[:, 0]
    flagged = flagged[scores[flagged].argsort(descending=True, stable=True)]
    told = f"{findings.threshold.how}; then all of the same label that {how}"
    return replace(
        findings,
        scores=scores,
        flagged=flagged,
        threshold=replace(findings.threshold, value=threshold, how=told),
        poison_found=bool(len(flagged)),
        summary=_summary(findings, len(flagged)),
    )


def _summary(findings: Findings, flagged: int) -> str:
    assert findings.observation is not None
    name = findings.class_names[findings.observation.predicted]
    if not flagged:
        return f"No poison found: nothing sets the answer {name!r} apart from an ordinary mistake"
    return f"Poison found: {flagged} of {len(findings)} training examples make the model answer {name!r}"
