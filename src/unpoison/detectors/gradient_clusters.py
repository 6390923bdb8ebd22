"""Gradient clusters: the examples of a label whose gradients share a direction that the others do not have.

Ours. The poisons of one attack teach the network one thing, and in the metric of the inverse curvature their
gradients have high cosines with each other and hardly any with those of clean examples (`_seed_expansion`),
also where nothing is seen in the features. No wrong answer is needed to see that. For each label:

1. cosines    of its examples with each other, w_j w_k / |w_j| |w_k| (`InfluenceIndex`), of at most 2,048 of
              them, evenly spread;
2. directions the 20 leading eigenvectors of the matrix of cosines, centred, and of that of the products
              w_j w_k, which weighs examples by their self-influence. A minority that shares a direction is
              seldom the first, which is what clean examples vary by;
3. clusters   from the 10 examples that lie farthest along each, to all that resemble them, as `calibrated`
              expands its seeds; and from the members of the best once more, if that separates them better;
4. decision   a cluster counts that has 5 members at least and a third of the label at most, and that is
              separated by 4 at least (`SplitScores.separation`, in units of the distance from the median of
              the others to their ninety-ninth percentile). The label's cluster of the largest separation is
              flagged.

The level of 4 is no p-value. It was chosen on nine networks of the bundled sample, where the largest
separation of 20 labels of two networks without poison was 2.9. On 30 others none of 276 labels without poison
was flagged, the largest separation being 3.0 (docs/influence_index.md, `recipes.scan_study`).

Cost: with an index products of its rows alone; without one it is made in a temporary directory, by three
passes over the training set. Then some 20 k^3 multiplications a label with k examples, up to 2,048. Memory:
five matrices of k^2 numbers. Limits: poison whose gradients share no direction, such as clean-label poison
and label noise, forms no cluster; nor do fewer than 5; nor, mostly, those that come from all classes.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import torch
from torch import Tensor

from unpoison._option_checks import check_options
from unpoison._seeds import derive_seed
from unpoison.detectors._estimates import Measured
from unpoison.detectors._findings import Findings
from unpoison.detectors._methods import register
from unpoison.detectors._search import OF_INFLUENCE, Search, Searcher
from unpoison.detectors._seed_expansion import SplitScores, expansion_of
from unpoison.influence import FACTOR_EXAMPLES, Damping, InfluenceIndex, Parts, RelativeDamping

_DAMPING = RelativeDamping(0.1)
_MOST: Final = 2048
_DIRECTIONS: Final = 20
_SEEDS: Final = 10
_MOST_SEEDS: Final = 64
_FEWEST: Final = 5
# The largest share of a label that may be a cluster.
_SHARE: Final = 1 / 3


@final
@register(
    name="gradient-clusters",
    title="Gradient clusters",
    summary="Flags the examples of a label whose gradients share a direction of their own.",
    paper="ours",
    cost="products of the rows of an index; three passes with per-example gradients without one",
    uses_index=True,
    can_find_nothing=True,
)
@dataclass(frozen=True, kw_only=True)
class GradientClusters(Searcher):
    """Flag the examples of a label whose gradients share a direction that the others do not have.

    Arguments:
        separation: how far a cluster must lie from the other examples of its label.
        damping: of the curvature, where there is no index.
        modules: which modules' parameters to track; all linear and convolution layers by default.
        covariance_examples: fit the covariances to this many examples; to all when None.
        eigenvalue_examples: fit the eigenvalues to this many examples; to all when None.
        batch_size: examples of a forward pass.
    """

    separation: float = 4.0
    damping: Damping = _DAMPING
    modules: tuple[str, ...] | None = None
    covariance_examples: int | None = FACTOR_EXAMPLES
    eigenvalue_examples: int | None = FACTOR_EXAMPLES
    batch_size: int = 128

    def __post_init__(self) -> None:
        check_options(
            self.method.name,
            self,
            separation="(0, inf)",
            **OF_INFLUENCE,
        )

    def memory_needed(self, measured: Measured) -> Parts:
        """See `Detector.memory_needed`."""
        cosines = {"cosines": 5 * 8 * min(measured.largest_class, _MOST) ** 2}
        return {**measured.influence(self, queries=1, asked=1), **cosines}

    def search(self, search: Search) -> Findings:
        """See the module's docstring."""
        labels = search.training_set.labels.cpu()
        scores, separations = torch.zeros(2, len(labels), dtype=torch.float64)
        with _index_of(search) as index:
            for label in range(search.training_set.num_classes):
                rows = (labels == label).nonzero()[:, 0]
                found = cluster_of(index, rows) if len(rows) > _FEWEST else None
                if found is not None:
                    scores[rows] = _relative(found)
                    if found.separation < self.separation:
                        scores[rows] = scores[rows].clamp(max=1)
                    separations[rows] = found.separation
                if search.progress is not None:
                    search.progress("clusters", label + 1, search.training_set.num_classes)
        return search.findings(
            scores=scores,
            threshold=1.0,
            how=f"the gap between a cluster and the other examples of its label, where it is separated by "
            f"{self.separation:g} at least",
            words="share a direction of their gradients that the others of their labels do not have",
            evidence={"separation": separations},
        )


@contextlib.contextmanager
def _index_of(search: Search) -> Iterator[InfluenceIndex]:
    """The index that was given, or one that is made for this search alone."""
    if search.index is not None:
        yield search.index
        return
    with tempfile.TemporaryDirectory() as folder:
        yield InfluenceIndex.build(
            Path(folder, "index"),
            search.model,
            search.training_set,
            seed=derive_seed(search.seed, "index"),
            factors=search.factors,
            damping=search.damping,
            batch_size=search.batch_size,
            progress=search.progress,
        )
    search.lap("index")


def cluster_of(index: InfluenceIndex, rows: Tensor) -> SplitScores | None:
    """The cluster of the largest separation among the examples Int64[k] `rows` of a label, if any counts."""
    some = rows[torch.arange(0, len(rows), max(1, -(-len(rows) // _MOST)))]
    cosines = index.cosines(some, some)
    best: SplitScores | None = None
    for direction in _directions(cosines, index.lengths(some)):
        seeds = direction.topk(min(_SEEDS, len(some))).indices
        found = expansion_of(cosines[seeds], seeds)
        if _counts(found) and (best is None or found.separation > best.separation):
            best = found
    if best is None:
        return None
    among = best.scores.masked_fill(~best.members, -torch.inf)
    again = some[among.topk(min(_MOST_SEEDS, int(best.members.sum()))).indices]
    every = expansion_of(index.cosines(again, rows), torch.searchsorted(rows, again))
    counting = [one for one in (every, best) if _counts(one) and len(one.scores) == len(rows)]
    return max(counting, key=lambda one: one.separation) if counting else None


def _counts(found: SplitScores) -> bool:
    return _FEWEST <= int(found.members.sum()) <= _SHARE * len(found.scores)


def _directions(cosines: Tensor, lengths: Tensor) -> Iterator[Tensor]:
    """Float64[k]: leading eigenvectors, each with its longer tail positive."""
    symmetric = (cosines + cosines.t()) / 2
    for matrix in (symmetric, lengths[:, None] * symmetric * lengths):
        centred = matrix - matrix.mean(0) - matrix.mean(1, keepdim=True) + matrix.mean()
        for direction in torch.linalg.eigh(centred)[1].flip(1)[:, :_DIRECTIONS].t():
            yield direction if float((direction**3).sum()) >= 0 else -direction


def _relative(found: SplitScores) -> Tensor:
    """Float64[k]: how far examples lie from the median of those outside of the cluster; 1 is the gap."""
    middle = found.scores[~found.members].median()
    return (found.scores - middle) / (found.threshold - middle)
