"""Calibrated Delta-Influence: the collapse of Delta-Influence, decided by a test and completed from seeds.

Ours; the stages in standard terms:

1. collapse    of the influence of every training example with the answered label when the input is asked
               about another label instead, divided by the norm of the example's gradient (`_collapse`).
2. calibration  the same for the model's own errors on labelled held-out examples, each asked about its own
               wrong answer, and for baseline inputs (`_calibration`). It does not depend on the answer that
               is traced: `calibrate` gives a `Calibration`, which can be saved and given to `find`.
3. decision    a statistic counts the unrelated examples that stand out, and is ranked above all others where
               these share a pattern that the input carries (`_shared_pattern`); its rank among the
               calibration errors is a conformal p-value (`_conformal`). Poison is found exactly when it is
               at most the level.
               A label that is not the answer (`Observation.answered`) is compared with labelled inputs that
               do not get it either, asked about the same label; and as an input with a trigger is unlike
               these, poison is found only where stage 4 finds a group of its own. `_decision`
               has this stage and those that follow.
4. expansion   from the examples that stand out most, the seeds, to all of the same attack: by the cosine of
               preconditioned gradients (`_seed_expansion`). Clean-label poison hardly shares a gradient
               direction. So, unless the members are separated from the other examples of their label, the
               artifact mixture is fitted as well to 8-bit images (`artifact_mixture`, with the same seeds);
               it decides where more than a quarter of the examples that it finds are no members. Else, where
               the inputs of the members share a pattern, it and the cosines decide together
               (`_shared_pattern`). Where no poison is found, this orders the examples, and flags none.
5. cause       what kind of cause the responsible examples speak for, poison or not (`_cause`).

`scores` are always in robust standard deviations (median, 1.4826 MAD) within the answered label, of what
decided stage 4. Examples with other labels come last.

Cost: two passes over 2,048 examples for the factors and, where the queries of a label fit into 1 GiB, one
over the training set for the calibration, all kept in it; then two passes over the examples with the answered
label, a forward pass of them for the cause, products of pixels, and for the first answer with a label three
forward passes for artifact features, where the members are not separated. Memory: at most 1 GiB of queries (8
of them where that is more), beside what `unpoison.influence` states. Limits: the poison bears the label that
it causes; one cause for the flagged share; a poison that made a few training examples decisive cannot be told
from an ordinary hard example. The level is that of an error that is exchangeable with the calibration errors:
held-out examples must come from where the answer comes from.
"""

from __future__ import annotations

import math
import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from torch import Tensor, nn

from unpoison._option_checks import check_options
from unpoison._progress import Progress
from unpoison.data import Examples
from unpoison.detectors._calibration import (
    Calibration,
    calibrate,
    chosen_inputs,
    key_of,
    queries_of_a_label,
)
from unpoison.detectors._collapse import most_queries
from unpoison.detectors._conformal import errors_needed, least_level
from unpoison.detectors._decision import decide
from unpoison.detectors._detector import Detector
from unpoison.detectors._estimates import Measured
from unpoison.detectors._findings import Findings
from unpoison.detectors._methods import register
from unpoison.detectors._observation import Observation, check_observation
from unpoison.detectors._search import OF_INFLUENCE, REFINED, Search
from unpoison.detectors._shared_pattern import pattern_bytes
from unpoison.errors import InputError, MismatchError
from unpoison.influence import (
    FACTOR_EXAMPLES,
    Damping,
    Factors,
    InfluenceIndex,
    Parts,
    RelativeDamping,
    tracked_layers,
    unchanged,
)

_DAMPING = RelativeDamping(0.1)

Groups = Sequence[Hashable] | Tensor


@final
@register(
    name="calibrated",
    title="Calibrated Delta-Influence",
    summary="Tests whether the wrong answer goes back to poison at a stated false-alarm level, and flags it.",
    paper="ours, after Li et al. 2026, arXiv 2411.13731",
    cost="a pass with per-example gradients, two over 2,048 examples, kept; two over one class an answer",
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
        covariance_examples: fit the covariances to this many examples; to all when None.
        eigenvalue_examples: fit the eigenvalues to this many examples; to all when None.
        batch_size: examples of a forward pass.

    Raises:
        InputError: a setting is out of range.

    >>> Calibrated(false_alarm_level=0.05).calibration_errors
    19
    """

    false_alarm_level: float = 0.01
    damping: Damping = _DAMPING
    modules: tuple[str, ...] | None = None
    covariance_examples: int | None = FACTOR_EXAMPLES
    eigenvalue_examples: int | None = FACTOR_EXAMPLES
    batch_size: int = 128

    def __post_init__(self) -> None:
        check_options(
            self.method.name,
            self,
            false_alarm_level="(0, 1)",
            **OF_INFLUENCE,
        )

    @property
    def calibration_errors(self) -> int:
        """How many the level takes: the least m with 1 / (m + 1) at most the level."""
        return errors_needed(self.false_alarm_level)

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
            return search.finished(decide(search, calibration, self.false_alarm_level))

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
                f"{least_level(len(calibration)):g} or calibrate on more examples"
            )

    def memory_needed(self, measured: Measured) -> Parts:
        """See `Detector.memory_needed`."""
        parameters = sum(math.prod(one.shape) for one in tracked_layers(measured.model, self.modules))
        queries = min(queries_of_a_label(measured.training_set.num_classes), most_queries(parameters))
        influence = measured.influence(
            self, queries=queries, asked=queries, examples=measured.largest_class, in_blocks=False
        )
        pattern = {"shared pattern": pattern_bytes(measured.training_set, measured.largest_class)}
        return max(influence, pattern, key=lambda parts: sum(parts.values()))

    def _calibrated(self, search: Search, groups: Groups | None) -> Calibration:
        """Stage 2. What can be wrong is found before the first pass."""
        source, (key, numbers) = search.clean, key_of(search, groups)
        inputs = chosen_inputs(search, source, self.false_alarm_level)
        return calibrate(search, source, inputs, key, numbers)
