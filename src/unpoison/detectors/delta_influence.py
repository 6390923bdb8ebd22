"""Delta-Influence: from one wrong prediction to the training examples that caused it, as published.

Li, Li, Zeng, Schroeder de Witt, Prabhu and Sanyal, "Delta-Influence: Unlearning Poisons via Influence
Functions" (arXiv 2411.13731; TMLR 2026). The label of an input that a poisoned model classifies wrongly is
owed to the poison: change the input and ask about another label, and the influence of the poison collapses,
while that of other examples goes up or down. Stages:

I    influence   `s_0[j]`: of every training example j on the margin of the wrong label y at the observed
                 input x, by EK-FAC.
II   draws       n times: one of seven image transformations, and another label: `(x_i, y_i) = g_i(x, y)`.
III  collapse    `D_i[j] = s_i[j] - s_0[j]`. The difference of the two measurement gradients is formed before
                 the product with the training gradients, so all n + 1 scores cost one pass over the training
                 set.
IV   votes       flag j when `D_i[j] < threshold` in at least n - tolerance of the n draws.

The presets `published`, `published-smooth` and `published-matching` are the three settings of the reference
experiments: BadNets, the smooth trigger, gradient matching. Their thresholds differ because they were tuned
for each attack. The rule names examples for any prediction, poisoned or not; `calibrated` is the detector
that can find nothing.

Departures: the published rule flags without ranking; here examples are ranked by votes, and among equal votes
by their mean collapse.

Cost: two passes over the training set for the factors (which can be reused) and one for the scores. Memory:
n + 1 queries of one number a tracked parameter, beside what `unpoison.influence` states.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

from torch import Tensor

from unpoison._option_checks import check_options
from unpoison._seeds import generator
from unpoison.detectors._estimates import Measured
from unpoison.detectors._findings import Findings
from unpoison.detectors._methods import register
from unpoison.detectors._queries import Changes, Drawing, Labels, Space
from unpoison.detectors._search import OF_INFLUENCE, Search, Searcher
from unpoison.errors import InputError
from unpoison.influence import AbsoluteDamping, Damping, Parts
from unpoison.registry import Presets

_DAMPING = AbsoluteDamping(1e-8)


@final
@register(
    name="delta-influence",
    title="Delta-Influence",
    summary="Flags the examples whose influence on the wrong answer collapses as input and label change.",
    paper="Li et al. 2026, arXiv 2411.13731",
    cost="three passes with per-example gradients",
    presets=("published", "published-smooth", "published-matching"),
    needs_observation=True,
    uses_index=True,
)
@dataclass(frozen=True, kw_only=True)
class DeltaInfluence(Searcher):
    """Flag the examples whose influence on one wrong prediction collapses in nearly all draws.

    Arguments:
        threshold: an influence that changes by less than this has collapsed; 0, or below, in the unit of the
            influence scores.
        tolerance: how many draws may fail, in 0..draws-1.
        draws: n, how many pairs of a transformation and a label.
        labels: how other labels are drawn: `uniform`, independently, or `distinct`, without repetition while
            there are labels left.
        space: what the transformations work on: `normalized` z-scores, as in the published code, or `pixels`.
        changes: what a draw changes: `both`, or for ablations the `image` or the `label` alone.
        damping: of the curvature; 1e-8 in the published experiments.
        modules: which modules' parameters to track; all linear and convolution layers by default.
        covariance_examples: fit the covariances to this many examples only.
        eigenvalue_examples: fit the eigenvalues to this many examples only.
        batch_size: examples of a forward pass.

    Raises:
        InputError: a setting is out of range.

    >>> from unpoison import detectors
    >>> detectors.get("delta-influence", preset="published-smooth").threshold
    -40.0
    """

    PRESETS: ClassVar[Presets] = {
        "published": {},
        "published-smooth": {"threshold": -40.0, "tolerance": 0, "labels": "distinct"},
        "published-matching": {"tolerance": 1},
    }

    threshold: float = 0.0
    tolerance: int = 2
    draws: int = 50
    labels: Labels = "uniform"
    space: Space = "normalized"
    changes: Changes = "both"
    damping: Damping = _DAMPING
    modules: tuple[str, ...] | None = None
    covariance_examples: int | None = None
    eigenvalue_examples: int | None = None
    batch_size: int = 128

    def __post_init__(self) -> None:
        check_options(
            self.method.name,
            self,
            tolerance="[0, inf)",
            draws="[1, inf)",
            **OF_INFLUENCE,
        )
        if self.tolerance >= self.draws:
            raise InputError(
                f"delta-influence: tolerance must be below the {self.draws} draws, found {self.tolerance}"
            )

    def memory_needed(self, measured: Measured) -> Parts:
        """See `Detector.memory_needed`."""
        asked = measured.observed * (1 + self.draws)
        return measured.influence(self, queries=1 + measured.observed * self.draws, asked=asked)

    @property
    def _drawing(self) -> Drawing:
        return Drawing(self.draws, self.labels, self.space, self.changes)

    def search(self, search: Search) -> Findings:
        """Stages I to III; see the module's docstring."""
        randomness = generator(search.seed, "draws", "suspect")  # the name is part of what a seed means
        queries = self._drawing.queries(
            search.observation.inputs, search.answer, search.training_set, randomness
        )
        scores = search.influence(
            queries.inputs, queries.labels, combine=queries.every_difference(), ranking=_mean_collapse
        )
        before, differences = scores.values[0].cpu(), scores.values[1:].cpu()
        findings = self._vote(search, before, differences)
        return replace(findings, draws=queries.draws, draw_images=queries.draw_images())

    def _vote(self, search: Search, before: Tensor, differences: Tensor) -> Findings:
        """Stage IV: from Float[n] s_0 and Float[draws n] D to flags."""
        votes = (differences < self.threshold).sum(0)
        needed = len(differences) - self.tolerance
        # The mean collapse adds less than half a vote, so no example lies on the threshold.
        collapse = -differences.mean(0).double()
        ranking = votes.double() + 0.49 * collapse / collapse.abs().max().clamp(min=1e-300)
        return search.findings(
            scores=ranking,
            threshold=needed - 0.5,
            how=f"influence fell by more than {0 - self.threshold:g} in at least {needed} of "
            f"{len(differences)} draws, as published; the rule names examples for any prediction",
            words=f"lose their influence on the answer {search.answer_name!r} in nearly every draw",
            evidence={
                "influence_before": before,
                "influence_after": before + differences.mean(0),
                "collapses": votes.float(),
            },
        )


def _mean_collapse(values: Tensor) -> Tensor:
    """Float[n] of Float[1 + draws, n]."""
    return -values[1:].mean(0)
