"""Calibrated Delta-Influence: the collapse of Delta-Influence, decided by a test and completed from seeds.

Ours; the stages in standard terms:

1. collapse    of the influence of every training example with the answered label when the input is asked
               about another label instead, divided by the norm of the example's gradient (`_collapse`).
2. calibration  the same for the model's own errors on labelled held-out examples, each asked about its own
               wrong answer, and for baseline inputs (`_calibration`). It does not depend on the answer that
               is traced: `calibrate` gives a `Calibration`, which can be saved and given to `find`.
3. decision    a statistic counts the unrelated examples that stand out; its rank among the calibration errors
               is a conformal p-value (`_conformal`). Poison is found exactly when it is at most the level.
               A label that is not the answer (`Observation.answered`) is compared with labelled inputs that
               do not get it either, asked about the same label; and as an input with a trigger is unlike
               these, poison is found only where stage 4 finds a group of its own.
4. expansion   from the examples that stand out most, the seeds, to all of the same attack: by the cosine of
               preconditioned gradients (`_seed_expansion`). Clean-label poison hardly shares a gradient
               direction. So, unless the members are separated from the other examples of their label, the
               artifact mixture is fitted as well to 8-bit images (`artifact_mixture`, with the same seeds);
               it decides where more than a quarter of the examples that it finds are no members. Where no
               poison is found, this orders the examples, and flags none.
5. cause       what kind of cause the responsible examples speak for, poison or not (`_cause`).

`scores` are always in robust standard deviations (median, 1.4826 MAD) within the answered label, of what
decided stage 4. Examples with other labels come last.

Cost: two passes over the training set for the factors and, where the queries of a label fit into 1 GiB, one
for the calibration, all kept in it; then two passes over the examples with the answered label, a forward pass
of them for the cause, and for the first answer with a label three for artifact features, where the members
are not separated.
Memory: at most 1 GiB of queries (8 of them where that is more), beside what `unpoison.influence`
states. Limits: the poison bears the label that it causes; one cause for the flagged share; a poison that made
a few training examples decisive cannot be told from an ordinary hard example. The level is that of an error
that is exchangeable with the calibration errors: held-out examples must come from where the answer comes
from.
"""

from __future__ import annotations

import math
import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, final

import torch
from torch import Tensor, nn

from unpoison._option_checks import check_options
from unpoison._progress import Progress
from unpoison._seeds import generator
from unpoison._stable import margins
from unpoison.data import Examples, TrainingSet
from unpoison.detectors._answers import answers_of, answers_to
from unpoison.detectors._calibration import (
    Calibration,
    calibrate,
    chosen_inputs,
    in_label,
    input_digests,
    key_of,
    queries_of_a_label,
    shuffled,
)
from unpoison.detectors._cause import Kind, cause_of
from unpoison.detectors._collapse import LabelCollapse, joined, most_queries, normalised, queries_of
from unpoison.detectors._conformal import RESPONSIBLE, robust_units
from unpoison.detectors._conformal import p_value as conformal_p_value
from unpoison.detectors._detector import Detector
from unpoison.detectors._estimates import Measured
from unpoison.detectors._findings import Findings, Threshold
from unpoison.detectors._methods import register
from unpoison.detectors._observation import Observation, check_observation
from unpoison.detectors._search import REFINED, Search
from unpoison.detectors._seed_expansion import SeedExpansion, expand_seeds
from unpoison.detectors.artifact_mixture import artifact_features, artifact_mixture
from unpoison.errors import InputError, MismatchError
from unpoison.influence import (
    Damping,
    Factors,
    InfluenceIndex,
    Parts,
    RelativeDamping,
    tracked_layers,
    unchanged,
)
from unpoison.tasks import ClassificationTask

_DAMPING = RelativeDamping(0.1)
# The excess from which an example may be a seed; so many are taken at least.
_SEED: Final = 6.0
_FEWEST_SEEDS: Final = 5
# The share of the examples with artifacts that must not be members, for the artifact mixture to decide.
_NO_MEMBERS: Final = 0.25

Groups = Sequence[Hashable] | Tensor


@final
@register(
    name="calibrated",
    title="Calibrated Delta-Influence",
    summary="Tests whether the wrong answer goes back to poison at a stated false-alarm level, and flags it.",
    paper="ours, after Li et al. 2026, arXiv 2411.13731",
    cost="three passes with per-example gradients, kept for further answers; two over one class for each",
    needs_observation=True,
    uses_index=True,
    can_find_nothing=True,
    uses_reference=True,
    calibrates=True,
)
@dataclass(frozen=True, kw_only=True)
class Calibrated(Detector):
    """Trace one wrong prediction to the training examples that caused it, or find that none did.

    Arguments:
        false_alarm_level: the probability that a wrong prediction without poison is called poisoned, in
            (0, 1). It takes 1 / level - 1 labelled held-out examples that the model classifies wrongly, or
            nearly so.
        damping: of the curvature.
        modules: which modules' parameters to track; all linear and convolution layers by default.
        covariance_examples: fit the covariances to this many examples only.
        eigenvalue_examples: fit the eigenvalues to this many examples only.
        batch_size: examples of a forward pass.

    Raises:
        InputError: a setting is out of range.

    >>> Calibrated(false_alarm_level=0.05).calibration_errors
    19
    """

    false_alarm_level: float = 0.01
    damping: Damping = _DAMPING
    modules: tuple[str, ...] | None = None
    covariance_examples: int | None = None
    eigenvalue_examples: int | None = None
    batch_size: int = 128

    def __post_init__(self) -> None:
        check_options(
            self.method.name,
            self,
            false_alarm_level="(0, 1)",
            covariance_examples="[1, inf)",
            eigenvalue_examples="[1, inf)",
            batch_size="[1, inf)",
        )

    @property
    def calibration_errors(self) -> int:
        """How many the level takes: the least m with 1 / (m + 1) at most the level."""
        return math.ceil(1 / self.false_alarm_level - 1e-9) - 1

    def calibrate(
        self,
        model: nn.Module,
        training_set: Examples,
        reference: Examples | None = None,
        *,
        groups: Groups | None = None,
        seed: int = 0,
        progress: Progress | None = None,
        factors: Factors | None = None,
        index: InfluenceIndex | None = None,
    ) -> Calibration:
        """What the model's own errors look like, for all answers that will be traced.

        Arguments:
            model: as for `find`.
            training_set: as for `find`.
            reference: labelled examples that the model was not trained on, from where the answers come that
                are to be traced; the training set stands in for it, and the level then hardly holds.
            groups: n names or numbers, equal for training examples that are near-duplicates (the frames of a
                film, the pictures of a patient); measured on the images when None.
            seed: of the factors and of the choice of examples.
            progress: as for `find`.
            factors: EK-FAC factors fitted to this model and training set, which are fitted anew by default.
            index: of this model and training set, from which influences are read.

        Raises:
            InputError: the labelled examples do not fit, or are too few for the level; there is not one group
                for each example.
            MismatchError: the factors were fitted to another model or other examples.
        """
        with unchanged(model):
            search = Search(self, model, training_set, None, reference, seed, progress, factors, index)
            return self._calibrated(search, groups)

    def kept(
        self,
        path: str | os.PathLike[str],
        model: nn.Module,
        training_set: Examples,
        reference: Examples | None = None,
        *,
        groups: Groups | None = None,
        seed: int = 0,
        index: InfluenceIndex | None = None,
    ) -> Calibration | None:
        """The calibration that lies at `path`, where `calibrate` would make the same one; else None."""
        search = Search(self, model, training_set, None, reference, seed, None, None, index)
        return self._kept(Path(path), search, groups)

    def _kept(self, path: Path, search: Search, groups: Groups | None) -> Calibration | None:
        try:
            calibration = Calibration.load(path)
            self._check(calibration)
        except InputError:
            return None
        return calibration if calibration.key == key_of(search, groups)[0] else None

    def find(
        self,
        model: nn.Module,
        training_set: Examples,
        observation: Observation | None = None,
        *,
        reference: Examples | None = None,
        seed: int = 0,
        progress: Progress | None = None,
        factors: Factors | None = None,
        calibration: Calibration | None = None,
        groups: Groups | None = None,
        index: InfluenceIndex | None = None,
        refine: int = REFINED,
    ) -> Findings:
        """See `Detector.find` and `calibrate`.

        Arguments:
            calibration: of this model and training set; `groups` and `factors` then have no further use, and
                `reference` and `seed` only for a label that is not the answer.
            index: of this model and training set, from which influences are read. A calibration that is not
                given is kept in its directory.
            refine: with an index, how many of the examples that stand out most, and of those that resemble
                the seeds most, are scored again, exactly, where poison is found.

        Raises:
            MismatchError: the calibration, the factors or the index are of another model, training set or
                damping, or the calibration was not made through this index.
        """
        observation = check_observation(model, training_set, observation)
        if calibration is not None:
            self._check(calibration)
            factors = calibration.factors
        with unchanged(model):
            search = Search(
                self, model, training_set, observation, reference, seed, progress, factors, index, refine
            )
            if index is not None and index.damping != self.damping:
                raise MismatchError(
                    f"{index.directory}: an index with the damping {index.damping!r}, not {self.damping!r}"
                )
            if calibration is None and index is not None:
                calibration = self._kept(index.calibration, search, groups)
                if calibration is None:
                    calibration = self._calibrated(search, groups)
                    calibration.save(index.calibration)
            elif calibration is None:
                calibration = self._calibrated(search, groups)
            elif calibration.index != (None if index is None else index.digest):
                raise MismatchError("this calibration was not made through the same index; calibrate anew")
            return search.finished(self._decided(search, calibration))

    def _check(self, calibration: Calibration) -> None:
        if calibration.damping != repr(self.damping):
            raise MismatchError(
                f"this calibration was made with the damping {calibration.damping}, not {self.damping!r}; "
                "calibrate anew"
            )
        if len(calibration) < self.calibration_errors:
            raise InputError(
                f"a false-alarm level of {self.false_alarm_level:g} takes {self.calibration_errors} "
                f"calibration errors, this calibration has {len(calibration)}; raise the level to "
                f"{math.ceil(1000 / (len(calibration) + 1)) / 1000:g} or calibrate on more examples"
            )

    def memory_needed(self, measured: Measured) -> Parts:
        """See `Detector.memory_needed`."""
        parameters = sum(math.prod(one.shape) for one in tracked_layers(measured.model, self.modules))
        queries = min(queries_of_a_label(measured.training_set.num_classes), most_queries(parameters))
        return measured.influence(
            self, queries=queries, asked=queries, examples=measured.largest_class, in_blocks=False
        )

    def _calibrated(self, search: Search, groups: Groups | None) -> Calibration:
        """Stage 2. What can be wrong is found before the first pass."""
        source, (key, numbers) = search.clean, key_of(search, groups)
        inputs = chosen_inputs(search, source, self.false_alarm_level)
        return calibrate(search, source, inputs, key, numbers)

    def _decided(self, search: Search, calibration: Calibration) -> Findings:
        """Stages 1 and 3 to 5."""
        rows = (search.training_set.labels.cpu() == search.answer).nonzero()[:, 0]
        if not len(rows):
            null = calibration.source
            return self._findings(search, null, rows, torch.zeros(3, 0), p_value=1.0, shared=0)
        examples, inputs = search.training_set.subset(rows), search.observation.inputs
        collapse, before = self._collapses(search, rows)
        excess = calibration.excess(collapse, rows)
        own = search.observation.answered or bool(
            (answers_of(search.model, inputs).argmax(1) == search.answer).all()
        )
        search.lap("scores")
        value = float(calibration.statistic(search.training_set, excess, rows))
        search.lap("near-duplicates")
        if own:
            p_value, shared = calibration.p_value(value, excess, rows, search.answer, input_digests(inputs))
            null = calibration.source
        else:
            others = self._asked_alike(search, calibration, rows)
            p_value, shared = conformal_p_value(value, others, torch.zeros_like(others))
            null = f"{len(others)} inputs with other answers, asked about the same label"
            if search.reference is None:
                null += ", of the training set, which the level hardly fits"
            if len(others) < self.calibration_errors:
                null += f" (the level takes {self.calibration_errors}, so nothing can be found)"
        found = p_value <= self.false_alarm_level + 1e-9
        if search.index is not None and search.refine and found:
            some = excess.topk(min(search.refine, len(rows))).indices
            collapse[some], before[some] = self._collapses(search, rows[some], exact=True)
            excess, search.refined = calibration.excess(collapse, rows), len(some)
        search.lap("scores")
        columns = torch.stack([excess, before, before - collapse])
        findings = self._findings(search, null, rows, columns, p_value=p_value, shared=shared)
        ranking = excess.argsort(descending=True, stable=True)
        seeds = ranking[: max(_FEWEST_SEEDS, int((excess > _SEED).sum()))]
        expanded, kind, apart = self._expanded(
            search, calibration, findings, examples, rows, seeds, excess, exact=found
        )
        if found and not (own or apart):
            said = f"No poison found: no group of its own is behind the label {search.answer_name!r}"
            findings, found = replace(findings, summary=said), False
        if found:
            findings = expanded
            members = torch.searchsorted(rows, findings.flagged)
        else:
            findings = replace(findings, scores=expanded.scores, evidence=expanded.evidence)
            members = ranking[: int((excess > RESPONSIBLE).sum())][:64]
        logits, misfits = self._fits(search, examples, rows, members)
        alike = calibration.near.alike_among(search.training_set, rows[members])
        cause = cause_of(members, alike, logits, misfits, search.answer, found=kind if found else None)
        search.lap("cause")
        told = [findings.summary, cause.describe(findings.class_names)]
        if search.observation.true_label is None:
            told.append("The true label is not given: the level holds for wrong answers alone")
        return replace(
            findings,
            configuration={**findings.configuration, **search.index_settings},
            cause=cause,
            summary=". ".join(told) + search.remarks(),
        )

    def _collapses(self, search: Search, rows: Tensor, *, exact: bool = False) -> Tensor:
        """Float64[2 k]: the normalised collapses and influences on the answer, of the examples `rows`."""
        inputs, label = search.observation.inputs, search.answer
        first, second = (
            queries_of(search, inputs, label, task, mean=True, exact=exact)
            for task in (LabelCollapse(), ClassificationTask())
        )
        return normalised(search, joined(first, second), rows, search.progress)

    def _fits(
        self, search: Search, examples: Examples, rows: Tensor, members: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Float[m classes]: the logits of the members, places among the `rows`; Float64[k]: how badly each of
        the rows is fitted, which an index knows."""
        if search.index is not None and len(members):
            return answers_to(search.model, examples.subset(members)), search.index.values(rows)
        logits = answers_to(search.model, examples)
        return logits[members], margins(logits.double())[:, search.answer]

    def _asked_alike(self, search: Search, calibration: Calibration, rows: Tensor) -> Tensor:
        """Float64[m]: the statistics of labelled inputs that neither have the traced label nor get it.

        An input that is not given a label is asked about it otherwise than an error about its own answer:
        that label is mostly far less likely.
        """
        source = search.clean
        answers, own = answers_to(search.model, source).argmax(1), source.labels.cpu()
        places = ((answers != search.answer) & (own != search.answer)).nonzero()[:, 0]
        places = shuffled(places, generator(search.seed, "inputs with other answers"))
        inputs = source.at(places[: 2 * self.calibration_errors])[0]
        excess = calibration.excess(in_label(search, inputs, search.answer, rows), rows)
        return calibration.statistic(search.training_set, excess, rows)

    def _findings(
        self,
        search: Search,
        null: str,
        rows: Tensor,
        columns: Tensor,
        *,
        p_value: float,
        shared: int,
    ) -> Findings:
        """The findings before expansion, in which nothing is flagged.

        `columns` are Float64[3 k]: the excess, the influence before and after, of the k examples `rows`.
        """
        left_out = f", {shared} left out that go back to the same examples" if shared else ""
        how = f"rank of the statistic among {null}{left_out}"
        names = ("excess", "influence_before", "influence_after")
        evidence = {
            name: _spread_out(column, rows, len(search.training_set), 0.0)
            for name, column in zip(names, columns, strict=True)
        }
        findings = search.findings(
            scores=_spread_out(columns[0], rows, len(search.training_set)),
            threshold=math.inf,
            how=how,
            words="",
            evidence=evidence,
        )
        return replace(
            findings,
            threshold=Threshold(math.inf, how, self.false_alarm_level),
            p_value=p_value,
            summary=f"No poison found: the answer {search.answer_name!r} does not differ from an ordinary "
            "error",
        )

    def _expanded(
        self,
        search: Search,
        calibration: Calibration,
        findings: Findings,
        examples: Examples,
        rows: Tensor,
        seeds: Tensor,
        excess: Tensor,
        *,
        exact: bool,
    ) -> tuple[Findings, Kind, bool]:
        """Stage 4: all examples that resemble the seeds, places among the `rows`, and whether these are a
        group of their own."""
        expansion = expand_seeds(search, seeds, examples, rows, exact=exact)
        search.lap("seed expansion")
        total = len(search.training_set)
        evidence = {
            **findings.evidence,
            "seed_similarity": _spread_out(expansion.scores, rows, total, 0.0),
        }
        log_odds = None
        if not expansion.separated:
            log_odds = self._artifacts(search, calibration, examples, seeds, excess)
        if log_odds is not None:
            evidence["artifact_log_odds"] = _spread_out(log_odds, rows, total, 0.0)
        selection = select(expansion, log_odds, excess, seeds)
        flagged = selection.flagged.nonzero()[:, 0]
        flagged = rows[flagged[selection.scores[flagged].argsort(descending=True, stable=True)]]
        centre, unit = robust_units(selection.scores)
        how = f"{findings.threshold.how}; then all of the same label with {selection.rule}"
        updated = replace(
            findings,
            scores=_spread_out((selection.scores - centre) / unit, rows, total),
            flagged=flagged,
            threshold=replace(
                findings.threshold, value=float((selection.threshold - centre) / unit), how=how
            ),
            poison_found=True,
            summary=f"Poison found: {len(flagged)} of {total} training examples make the model answer "
            f"{search.answer_name!r}",
            evidence=evidence,
        )
        return updated, selection.kind, expansion.separated or selection.kind == "optimised images"

    def _artifacts(
        self, search: Search, calibration: Calibration, examples: Examples, seeds: Tensor, excess: Tensor
    ) -> Tensor | None:
        """Float64[k]: the log-odds of the artifact mixture, where examples are 8-bit images that show one."""
        if not isinstance(examples, TrainingSet):
            return None
        model, known = search.model, calibration.artifacts
        if search.answer not in known:
            known[search.answer] = artifact_features(model, examples, self.batch_size, search.progress)
        log_odds = artifact_mixture(
            model,
            examples,
            seeds,
            torch.ones(len(examples), dtype=torch.bool),
            excess,
            batch_size=self.batch_size,
            features=known[search.answer],
        )
        search.lap("artifact features")
        return log_odds


@final
@dataclass(frozen=True, eq=False)
class Selection:
    """Float[n] scores, Bool[n] which examples are flagged (those above the threshold), and why."""

    scores: Tensor
    threshold: float
    flagged: Tensor
    rule: str
    kind: Kind


def select(expansion: SeedExpansion, log_odds: Tensor | None, excess: Tensor, seeds: Tensor) -> Selection:
    """The examples of the same attack as the seeds, by the rule of stage 4.

    Arguments:
        expansion: by similar gradients.
        log_odds: Float64[n], of the artifact mixture; None where the seeds show no artifacts, or where it was
            not asked for.
        excess: Float64[n], by which the seeds were chosen.
        seeds: Int64[k], which are all where none has similar gradients.
    """
    members = expansion.members
    if log_odds is not None:
        found = log_odds > 0
        if int((found & ~members).sum()) > _NO_MEMBERS * int(found.sum()):
            rule = "the same artifacts: noise, and displacement under recompression and a shift"
            return Selection(log_odds, 0.0, found, rule, "optimised images")
    if not bool(members.any()):
        members = torch.zeros_like(members)
        members[seeds] = True
        threshold = float(excess[members].min()) - 1e-9
        return Selection(
            excess, threshold, members, "the largest excess, as no other is similar", "trigger-like"
        )
    rule = "similar gradients, up to the gap to the other examples"
    return Selection(expansion.scores, expansion.threshold, members, rule, "trigger-like")


def _spread_out(values: Tensor, rows: Tensor, total: int, elsewhere: float | None = None) -> Tensor:
    """Float64[total]: the values at their rows, elsewhere less than any of them by default."""
    if elsewhere is None:
        elsewhere = float(values.min()) - 1 if len(values) else 0.0
    result = torch.full((total,), elsewhere, dtype=torch.float64)
    result[rows] = values.double()
    return result
