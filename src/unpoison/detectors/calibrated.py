"""Calibrated Delta-Influence: the collapses of Delta-Influence, decided by a test and completed from seeds.

Ours; the stages in standard terms:

1. collapse    of every training example's influence on the observation, as in `delta_influence`, divided by
               the root of its self-influence (l-RelatIF; Barshan, Brunet and Dziugaite, "RelatIF: Identifying
               Explanatory Training Samples via Relative Influence", 2020), so that a few examples with large
               gradients do not outweigh the rest. The training gradient is that of the margin: a positive
               multiple of that of the loss, so that the quotient is the same, which does not vanish for
               examples that the model has fitted perfectly, as it often has the poison.
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
from typing import Final, final

import torch
from torch import Tensor

from unpoison._option_checks import check_options
from unpoison._seeds import generator
from unpoison.detectors._conformal import Decision, decide
from unpoison.detectors._findings import Findings, Threshold
from unpoison.detectors._methods import register
from unpoison.detectors._queries import Changes, Drawing, Labels, Queries
from unpoison.detectors._search import Search, Searcher
from unpoison.detectors._seed_expansion import SeedExpansion, expand_seeds
from unpoison.detectors.artifact_mixture import artifact_mixture
from unpoison.errors import InputError
from unpoison.influence import Damping, RelativeDamping
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
class Calibrated(Searcher):
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
        check_options(
            self.method.name,
            self,
            false_alarm_level="(0, 1)",
            false_discoveries="(0, 1)",
            draws="[1, inf)",
            covariance_examples="[1, inf)",
            batch_size="[1, inf)",
        )

    @property
    def calibration_inputs(self) -> int:
        """How many the level takes: 2 / level - 1, at least 3."""
        return max(3, round(2 / self.false_alarm_level) - 1)

    @property
    def _drawing(self) -> Drawing:
        return Drawing(self.draws, self.labels, "pixels", self.changes)

    def search(self, search: Search) -> Findings:
        """See the module's docstring.

        Raises:
            InputError: there are too few calibration inputs for the level.
        """
        calibration = self._calibration(search)
        collapses = self._collapses(search, calibration)
        decision = decide(
            collapses.normalised[0],
            collapses.normalised[1:],
            search.training_set.labels.cpu() == search.answer,
            level=self.false_alarm_level,
            false_discoveries=self.false_discoveries,
            ignore=calibration.indices,
        )
        findings = self._undecided(search, calibration, collapses, decision)
        return self._expanded(search, findings, decision) if len(decision.seeds) else findings

    def _calibration(self, search: Search) -> _CalibrationInputs:
        """The correctly classified examples of other classes that are nearest to the answer."""
        training_set, reference = search.training_set, search.reference
        if len(training_set) < 2:
            raise InputError(f"{training_set.name}: needs two training examples or more to compare")
        source = training_set if reference is None else reference
        if source.image_shape != training_set.image_shape or source.num_classes != training_set.num_classes:
            raise InputError(
                f"{source.name}: a reference needs images of shape {training_set.image_shape} in "
                f"{training_set.num_classes} classes, found {source.image_shape} in {source.num_classes}"
            )
        logits = predict(search.model, source.images).cpu()
        labels = source.labels.cpu()
        others = ((logits.argmax(1) == labels) & (labels != search.answer)).nonzero()[:, 0]
        if len(others) < self.calibration_inputs:
            fits = math.ceil(2000 / (len(others) + 1)) / 1000
            advice = f"raise the level to {fits} or give" if len(others) >= 3 else "give"
            raise InputError(
                f"{source.name}: a false alarm level of {self.false_alarm_level} takes "
                f"{self.calibration_inputs} examples of other classes that the model classifies correctly, "
                f"there are {len(others)}; {advice} a larger reference"
            )
        nearness = logits.log_softmax(1)[others, search.answer]
        chosen = others[nearness.argsort(descending=True, stable=True)[: self.calibration_inputs]]
        images = source.images[chosen.to(source.device)].cpu()
        search.lap("calibration inputs")
        return _CalibrationInputs(images, chosen if reference is None else None)

    def _collapses(self, search: Search, calibration: _CalibrationInputs) -> _Collapses:
        """Stage 1, for the observation and every calibration input, in one pass over the training set."""

        def queries(images: Tensor, stream: str) -> Queries:
            randomness = generator(search.seed, "draws", stream)
            return self._drawing.queries(images, search.answer, search.training_set, randomness)

        # The names of the streams are part of what a seed means.
        own = queries(search.observation.images, "suspect")
        others = [queries(image[None], f"innocent {place}") for place, image in enumerate(calibration.images)]
        scores = search.influence(
            torch.cat([own.inputs, *(other.inputs for other in others)]),
            torch.cat([own.labels, *(other.labels for other in others)]),
            combine=torch.block_diag(  # type: ignore[no-untyped-call]
                own.every_difference(), *(other.mean_difference() for other in others)
            ),
            gradient="measurement",
            self_influence=True,
        )
        assert scores.self_influence is not None
        values, length = scores.values.cpu(), scores.self_influence.cpu().sqrt()
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
        )

    def _undecided(
        self, search: Search, calibration: _CalibrationInputs, collapses: _Collapses, decision: Decision
    ) -> Findings:
        """The findings before expansion, in which nothing is flagged."""
        source = "the training set" if calibration.indices is not None else "a trusted reference"
        findings = search.findings(
            scores=decision.excess,
            threshold=math.inf,
            how=f"more influence on this answer than for {self.calibration_inputs} calibration inputs from "
            f"{source}",
            words="",
            evidence={
                "influence_before": collapses.before,
                "influence_after": collapses.after,
                "collapses": collapses.votes,
                "normalised_collapse": collapses.normalised[0],
                "excess": decision.excess,
            },
        )
        return replace(
            findings,
            threshold=Threshold(decision.threshold, findings.threshold.how, self.false_alarm_level),
            p_value=decision.p_value,
            summary=f"No poison found: the answer {search.answer_name!r} does not differ from an ordinary "
            "error",
            draws=collapses.queries.draws,
            draw_images=collapses.queries.draw_images(),
        )

    def _expanded(self, search: Search, findings: Findings, decision: Decision) -> Findings:
        """Stage 4: all examples that resemble the seeds, by the rule of the module's docstring."""
        seeds, how = decision.seeds, findings.threshold.how
        if not decision.found:
            likely = (findings.labels == search.answer).nonzero()[:, 0]
            places = torch.searchsorted(likely, seeds)
            own = expand_seeds(search, places, search.training_set.subset(likely))
            search.lap("seed expansion")
            if not own.separated or 2 * int(own.members[places].sum()) <= len(places):
                return findings
            how += f", which leaves doubt (p = {decision.p_value:.3g}), but in a separated group"
        expansion = expand_seeds(search, seeds)
        search.lap("seed expansion")
        evidence = {**findings.evidence, "seed_similarity": expansion.scores}
        log_odds = None
        if not expansion.separated:
            log_odds = artifact_mixture(
                search.model,
                search.training_set,
                seeds,
                expansion.candidates,
                decision.excess,
                batch_size=self.batch_size,
                progress=search.progress,
            )
            search.lap("artifact features")
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
            summary=f"Poison found: {len(indices)} of {len(findings)} training examples make the model "
            f"answer {search.answer_name!r}"
            if len(indices)
            else findings.summary,
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
    """

    normalised: Tensor
    before: Tensor
    after: Tensor
    votes: Tensor
    queries: Queries
