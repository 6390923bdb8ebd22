"""Calibrated Delta-Influence: the collapses of Delta-Influence, decided by a test and completed from seeds.

Ours; the stages in standard terms:

1. collapse    of every training example's influence on the observation, as in `delta_influence`, divided by
               the root of its self-influence (l-RelatIF; Barshan, Brunet and Dziugaite, "RelatIF: Identifying
               Explanatory Training Samples via Relative Influence", 2020), so that a few examples with large
               gradients do not outweigh the rest.
2. calibration inputs  m of them: examples of other classes that the model classifies correctly, those nearest
               to the answer first, each with queries of its own as if it had been given that answer: what an
               ordinary error would look like. From `reference`, or from the training set.
3. decision    a conformal p-value of the observation among the calibration inputs, and seeds, the examples
               that are surely responsible (`_conformal`). Where p is above the level and at most .5, the ten
               examples with the answered label whose influence collapses most are seeds, and poison is found
               only if most of them belong to a separated group of similar gradients.
4. expansion   from the seeds to all of the same attack: by the cosine of preconditioned gradients
               (`_seed_expansion`). Clean-label poison hardly shares a gradient direction. So, unless the
               members are separated from the other examples of their label, the artifact mixture is fitted
               as well (`artifact_mixture`, with the same seeds); it decides where more than a quarter of the
               examples that it finds are no members.

`scores` are in the unit of what decided: log-odds of the artifact mixture, cosines, or, where nothing is
found, the excess of `_conformal`. `threshold.how` says which.

Cost: two passes over the training set for the factors (they can be reused), one for the scores; one more
where poison is found, one over the examples with the answered label where the p-value leaves doubt, three
forward passes of one class for artifact features. 1 + draws gradients for each calibration input. Memory:
1 + draws + m queries of one number a tracked parameter, beside what `unpoison.influence` states. Limits: one
cause for the flagged share; a poison that made a single training example decisive cannot be told from an
ordinary hard example.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, final

import torch
from torch import Tensor, nn

from unpoison._memory import peak_bytes
from unpoison._progress import Progress
from unpoison._seeds import generator
from unpoison.data import TrainingSet
from unpoison.detectors._conformal import Decision, decide
from unpoison.detectors._detector import Detector, Stopwatch
from unpoison.detectors._findings import Findings, Threshold
from unpoison.detectors._methods import register
from unpoison.detectors._observation import Observation, check_observation
from unpoison.detectors._queries import Changes, Drawing, Labels, Queries, usable_factors
from unpoison.detectors._scan import settings_of
from unpoison.detectors._seed_expansion import SeedExpansion, expand_seeds
from unpoison.detectors.artifact_mixture import artifact_mixture
from unpoison.errors import InputError
from unpoison.influence import ClassificationTask, Damping, Factors, RelativeDamping, precondition, score
from unpoison.training import predict

_DAMPING = RelativeDamping(0.1)
# The share of the examples with artifacts that must not be members, for the artifact mixture to decide.
_NO_MEMBERS: Final = 0.25


@final
@register(
    name="calibrated",
    title="Calibrated Delta-Influence",
    summary="Tests whether the wrong answer goes back to poison at a stated false-alarm level, and flags it.",
    paper="ours, after Li et al. 2026, arXiv 2411.13731",
    cost="three passes with per-example gradients, four where poison is found",
    needs_observation=True,
    can_find_nothing=True,
    uses_reference=True,
)
@dataclass(frozen=True, kw_only=True)
class Calibrated(Detector):
    """Trace one wrong prediction to the training examples that caused it, or find that none did.

    Arguments:
        false_alarm_level: the probability that a wrong prediction without poison is called poisoned, in
            (0, 1). It is that of the p-value; where that leaves doubt, seed expansion may find poison as
            well, and no theory bounds how often that adds a false alarm (`benchmarks.false_alarms` counts
            them).
        false_discoveries: the share of the selected examples that may be clean, in (0, 1), among those with
            the answered label; a tenth of it among the others. The seeds are their upper half.
        draws: how many pairs of a transformation and a label.
        labels: how other labels are drawn: `uniform`, independently, or `distinct`, without repetition while
            there are labels left.
        changes: what a draw changes: `both`, or for ablations the `image` or the `label` alone.
        damping: of the curvature.
        modules: which modules' parameters to track; all Linear and Conv2d by default.
        covariance_examples: fit the covariances to this many examples only.
        batch_size: examples of a forward pass.

    Raises:
        InputError: a setting is out of range.

    >>> Calibrated(false_alarm_level=0.05).calibration_inputs
    39
    """

    false_alarm_level: float = 0.01
    false_discoveries: float = 0.1
    draws: int = 50
    labels: Labels = "uniform"
    changes: Changes = "both"
    damping: Damping = _DAMPING
    modules: tuple[str, ...] | None = None
    covariance_examples: int | None = None
    batch_size: int = 128

    def __post_init__(self) -> None:
        for name in ("false_alarm_level", "false_discoveries"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"Calibrated: {name} must lie between 0 and 1, found {getattr(self, name)}")
        _ = self._drawing  # checks draws, labels and changes

    @property
    def calibration_inputs(self) -> int:
        """How many the level takes: 2 / level - 1, at least 3."""
        return max(3, round(2 / self.false_alarm_level) - 1)

    @property
    def _drawing(self) -> Drawing:
        return Drawing(self.draws, self.labels, "pixels", self.changes)

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
        """See `Detector.find`.

        Arguments:
            factors: EK-FAC factors fitted to this model and training set; they are fitted anew by default.

        Raises:
            InputError: there are too few calibration inputs for the level.
        """
        observation = check_observation(model, training_set, observation)
        watch = Stopwatch()
        inputs = self._calibration(model, training_set, observation.answer, reference)
        watch.lap("calibration inputs")
        factors = usable_factors(
            model,
            training_set,
            factors,
            seed=seed,
            modules=self.modules,
            covariance_examples=self.covariance_examples,
            batch_size=self.batch_size,
            progress=progress,
        )
        watch.lap("factors")
        collapses = self._collapses(model, factors, training_set, observation, inputs, seed, progress)
        watch.lap("scores")
        decision = decide(
            collapses.normalised[0],
            collapses.normalised[1:],
            training_set.labels.cpu() == observation.answer,
            level=self.false_alarm_level,
            false_discoveries=self.false_discoveries,
            ignore=inputs.indices,
        )
        findings = self._undecided(training_set, observation, inputs, collapses, decision, seed)
        if len(decision.seeds):
            findings = self._expanded(findings, decision, model, factors, training_set, watch, progress)
        return replace(findings, seconds=watch.seconds, peak_bytes=peak_bytes(collapses.device))

    def _calibration(
        self, model: nn.Module, training_set: TrainingSet, answer: int, reference: TrainingSet | None
    ) -> _CalibrationInputs:
        """The correctly classified examples of other classes that are nearest to the answer."""
        source = training_set if reference is None else reference
        if source.image_shape != training_set.image_shape or source.num_classes != training_set.num_classes:
            raise InputError(
                f"{source.name}: a reference needs images of shape {training_set.image_shape} in "
                f"{training_set.num_classes} classes, found {source.image_shape} in {source.num_classes}"
            )
        logits = predict(model, source.images).cpu()
        labels = source.labels.cpu()
        others = ((logits.argmax(1) == labels) & (labels != answer)).nonzero()[:, 0]
        if len(others) < self.calibration_inputs:
            fits = math.ceil(2000 / (len(others) + 1)) / 1000
            advice = f"raise the level to {fits} or give" if len(others) >= 3 else "give"
            raise InputError(
                f"{source.name}: a false alarm level of {self.false_alarm_level} takes "
                f"{self.calibration_inputs} examples of other classes that the model classifies correctly, "
                f"there are {len(others)}; {advice} a larger reference"
            )
        nearness = logits.log_softmax(1)[others, answer]
        chosen = others[nearness.argsort(descending=True, stable=True)[: self.calibration_inputs]]
        images = source.images[chosen.to(source.device)].cpu()
        return _CalibrationInputs(images, chosen if reference is None else None)

    def _collapses(
        self,
        model: nn.Module,
        factors: Factors,
        training_set: TrainingSet,
        observation: Observation,
        calibration: _CalibrationInputs,
        seed: int,
        progress: Progress | None,
    ) -> _Collapses:
        """Stage 1, for the observation and every calibration input, in one pass over the training set."""

        def queries(images: Tensor, stream: str) -> Queries:
            randomness = generator(seed, "draws", stream)
            return self._drawing.queries(images, observation.answer, training_set, randomness)

        # The names of the streams are part of what a seed means.
        own = queries(observation.images, "suspect")
        others = [queries(image[None], f"innocent {place}") for place, image in enumerate(calibration.images)]
        task = ClassificationTask()
        preconditioned = precondition(
            model,
            factors,
            (
                torch.cat([own.inputs, *(other.inputs for other in others)]),
                torch.cat([own.labels, *(other.labels for other in others)]),
            ),
            task,
            combine=torch.block_diag(  # type: ignore[no-untyped-call]
                own.every_difference(), *(other.mean_difference() for other in others)
            ),
            damping=self.damping,
            batch_size=self.batch_size,
            progress=progress,
        )
        scores = score(
            model,
            preconditioned,
            training_set,
            task,
            self_influence=True,
            batch_size=self.batch_size,
            progress=progress,
        )
        assert scores.self_influence is not None
        values, length = scores.values.cpu(), scores.self_influence.cpu().clamp(min=0).sqrt()
        length = torch.where(length > 0, length, torch.inf)
        before, differences = values[0], values[1 : 1 + len(own.draws)]
        collapses = -torch.cat([differences.mean(0, keepdim=True), values[1 + len(own.draws) :]]) / length
        deviation = collapses.std(1, keepdim=True).clamp(min=torch.finfo(collapses.dtype).tiny)
        return _Collapses(
            normalised=collapses / deviation,
            before=before / length,
            after=(before + differences.mean(0)) / length,
            votes=(differences < 0).sum(0).float(),
            queries=own,
            device=scores.values.device,
        )

    def _undecided(
        self,
        training_set: TrainingSet,
        observation: Observation,
        calibration: _CalibrationInputs,
        collapses: _Collapses,
        decision: Decision,
        seed: int,
    ) -> Findings:
        """The findings before expansion, in which nothing is flagged."""
        source = "the training set" if calibration.indices is not None else "a trusted reference"
        return Findings(
            method=self.method.name,
            configuration=settings_of(self) | {"seed": seed},
            fingerprint=training_set.fingerprint,
            labels=training_set.labels.cpu(),
            class_names=training_set.class_names,
            scores=decision.excess,
            flagged=torch.empty(0, dtype=torch.int64),
            threshold=Threshold(
                decision.threshold,
                f"more influence on this answer than for {self.calibration_inputs} calibration inputs from "
                f"{source}",
                self.false_alarm_level,
            ),
            poison_found=False,
            p_value=decision.p_value,
            summary="No poison found: the answer "
            f"{training_set.class_names[observation.answer]!r} does not differ from an ordinary error",
            evidence={
                "influence_before": collapses.before,
                "influence_after": collapses.after,
                "collapses": collapses.votes,
                "normalised_collapse": collapses.normalised[0],
                "excess": decision.excess,
            },
            observation=observation,
            draws=collapses.queries.draws,
            draw_images=collapses.queries.draw_images(),
        )

    def _expanded(
        self,
        findings: Findings,
        decision: Decision,
        model: nn.Module,
        factors: Factors,
        training_set: TrainingSet,
        watch: Stopwatch,
        progress: Progress | None,
    ) -> Findings:
        """Stage 4: all examples like the seeds, by the rule of the module's docstring."""
        expand = partial(
            expand_seeds, model, factors, damping=self.damping, batch_size=self.batch_size, progress=progress
        )
        assert findings.observation is not None
        seeds, how = decision.seeds, findings.threshold.how
        if not decision.found:
            likely = (findings.labels == findings.observation.answer).nonzero()[:, 0]
            places = torch.searchsorted(likely, seeds)
            own = expand(training_set.subset(likely), places)
            watch.lap("seed expansion")
            if not own.separated or 2 * int(own.members[places].sum()) <= len(places):
                return findings
            how += f", which leaves doubt (p = {decision.p_value:.3g}), but in a separated group"
        expansion = expand(training_set, seeds)
        watch.lap("seed expansion")
        evidence = {**findings.evidence, "seed_similarity": expansion.scores}
        log_odds = None
        if not expansion.separated:
            log_odds = artifact_mixture(
                model,
                training_set,
                seeds,
                expansion.candidates,
                decision.excess,
                batch_size=self.batch_size,
                progress=progress,
            )
            watch.lap("artifact features")
        if log_odds is not None:
            evidence["artifact_log_odds"] = log_odds
        selection = select(expansion, log_odds)
        indices = selection.flagged.nonzero()[:, 0]
        indices = indices[selection.scores[indices].argsort(descending=True, stable=True)]
        how += f"; then all of the same label with {selection.rule}"
        return replace(
            findings,
            scores=selection.scores,
            flagged=indices,
            threshold=replace(findings.threshold, value=selection.threshold, how=how),
            poison_found=bool(len(indices)),
            summary=_found(findings, len(indices)),
            evidence=evidence,
        )


@final
@dataclass(frozen=True, eq=False)
class Selection:
    """Float[n] scores, Bool[n] which examples are flagged (those above the threshold), and why."""

    scores: Tensor
    threshold: float
    flagged: Tensor
    rule: str


def select(expansion: SeedExpansion, log_odds: Tensor | None) -> Selection:
    """The examples of the same attack as the seeds, by the rule of stage 4.

    Arguments:
        expansion: by similar gradients.
        log_odds: Float64[n], of the artifact mixture; None where the seeds show no artifacts, or where it was
            not asked for.
    """
    members = expansion.members
    if log_odds is not None:
        found = expansion.candidates & (log_odds > 0)
        if int((found & ~members).sum()) > _NO_MEMBERS * int(found.sum()):
            rule = "the same artifacts: noise, and displacement under recompression and a shift"
            return Selection(log_odds, 0.0, found, rule)
    rule = "similar gradients, up to the gap to the other examples"
    return Selection(expansion.scores, expansion.threshold, members, rule)


@final
@dataclass(frozen=True, eq=False)
class _CalibrationInputs:
    """UInt8[m c h w], and which training examples they are, if they are: Int64[m]."""

    images: Tensor
    indices: Tensor | None


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class _Collapses:
    """What stage 1 gives.

    Arguments:
        normalised: Float[1 + m, n], of the observation and of the calibration inputs, each row in units of
            its standard deviation.
        before: Float[n], the normalised influence on the observation.
        after: Float[n], its mean over the draws.
        votes: Float[n], the number of draws in which the influence falls.
        queries: those of the observation.
        device: where the scores were computed.
    """

    normalised: Tensor
    before: Tensor
    after: Tensor
    votes: Tensor
    queries: Queries
    device: torch.device


def _found(findings: Findings, flagged: int) -> str:
    assert findings.observation is not None
    if not flagged:
        return findings.summary
    name = findings.class_names[findings.observation.answer]
    return f"Poison found: {flagged} of {len(findings)} training examples make the model answer {name!r}"
