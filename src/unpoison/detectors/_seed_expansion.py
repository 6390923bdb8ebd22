"""Seed expansion: from the examples that are surely poison to the others of the same attack.

One query finds the poisons that resemble it most. All poisons of one attack share a cause, though, and so a
direction: with u_j = g_j / sqrt(g_j^T P g_j), the unit gradients in the metric of the inverse curvature P,
and their mean m over the examples with the label, the centred cosine

    cos(j, k) = (u_j - m)^T P (u_k - m) / (|u_j - m| |u_k - m|),  |v|^2 = v^T P v,

is high between poisons and near zero between a poison and a clean example of the same class. Without m it is
less so, for all examples with one label have in common what raises its logit. The gradients are those of the
margin, which have the same cosines as those of the loss and do not vanish for examples that are fitted
perfectly. Stages:

1. the mean unit gradient, of 128 examples drawn at random, and centred cosines of every example with at most
   64 seeds;
2. their weights: the leading eigenvector of the cosines among the seeds, so that a few clean ones among them,
   which are similar to none of the others, carry next to no weight;
3. score = weighted mean cosine. The scores are cut in two by minimum error (Kittler and Illingworth, "Minimum
   error thresholding", 1986), which takes both groups as normal, and the threshold is then lowered to the
   widest gap, as a ratio, between that and the bulk of the clean examples: the poison that least resembles
   the rest makes a long lower tail. Examples above it are members.

Cost: one pass over the examples with one label, and one over those drawn. Memory: one query for each seed and
one more; fewer seeds count where these would take more than 1 GiB, but at least 8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from unpoison._seeds import generator
from unpoison.data import Examples
from unpoison.detectors._collapse import most_queries
from unpoison.detectors._search import Search

# Chosen on the development networks of `_decision`; halving or doubling it changes recall and precision
# by .003 at most (docs/delta_influence.md).
_MOST_SEEDS: Final = 64
# Chosen on the development networks of `_decision`; 64 and 256 change recall and precision by .015 at most.
_AVERAGED: Final = 128
# The separation from which members are a group of their own. Of 70 answers of a network trained on clean data
# of the sample two gave as much (2.1), of 70 on traffic signs, where the frames of a film are a group, 17; of
# ten poisoned networks three gave less. Gradient matching, whose poisons hardly share a direction, gave about
# 1.5 before cosines were centred.
_SEPARATED: Final = 2.0


@final
@dataclass(frozen=True, eq=False)
class SplitScores:
    """Scores of examples, split in two at a threshold.

    Arguments:
        scores: Float64[n].
        threshold: the score above which an example is a member.
    """

    scores: Tensor
    threshold: float

    @property
    def members(self) -> Tensor:
        """Bool[n]: the examples above the threshold."""
        return self.scores > self.threshold

    @property
    def separation(self) -> float:
        """How far nine in ten of the members lie from the median of the other examples.

        In units of the distance between that median and the ninety-ninth percentile of the others; infinite
        where there are no others, minus infinity where there are no members.
        """
        members, others = self.scores[self.members], self.scores[~self.members]
        if not len(members) or not len(others):
            return math.inf if len(members) else -math.inf
        middle = others.median()
        unit = (others.quantile(0.99) - middle).clamp(min=torch.finfo(others.dtype).tiny)
        return float((members.quantile(0.1) - middle) / unit)

    @property
    def separated(self) -> bool:
        """Whether the members are a minority that is clearly separated from the other examples.

        The tail of a clean class that shares a direction is less separated.
        """
        return 2 * int(self.members.sum()) <= len(self.scores) and self.separation >= _SEPARATED


def expand_seeds(
    search: Search,
    seeds: Tensor,
    examples: Examples,
    rows: Tensor | None = None,
    *,
    exact: bool = True,
) -> SplitScores:
    """Score every example by its centred cosine with the seeds, in the metric of the inverse curvature.

    Arguments:
        search: the model, its factors and the settings of the engine.
        seeds: Int64[k], indices into the examples; the first 64 count, or as many as fit.
        examples: those with the label of the seeds.
        rows: Int64[n], their places in the training set, for an index.
        exact: with an index, score the nearest again with their gradients, as the search's `refine` says.
    """
    seeds = seeds[: min(_MOST_SEEDS, most_queries(search.factors.num_parameters))].cpu()
    order = torch.randperm(len(examples), generator=generator(search.seed, "mean gradient of a label"))
    drawn = order[:_AVERAGED].sort().values
    if search.index is None or rows is None:
        products, mean = _products(search, examples, seeds, drawn)
        return expansion_of(_centred(products, mean, seeds, drawn), seeds)
    products = search.index.cosines(rows[seeds], rows)
    mean = search.index.mean_cosines(rows[drawn], rows)
    cosines = _centred(products, mean, seeds, drawn)
    if search.refine and exact:
        nearest = cosines.mean(0).topk(min(search.refine, len(rows))).indices
        chosen = torch.tensor(sorted({*nearest.tolist(), *seeds.tolist(), *drawn.tolist()}))
        places = (torch.searchsorted(chosen, some) for some in (seeds, drawn))
        products[:, chosen], mean[chosen] = _products(search, examples.subset(chosen), *places)
        cosines = _centred(products, mean, seeds, drawn)
        search.refined = max(search.refined, len(chosen))
    return expansion_of(cosines, seeds)


def expansion_of(cosines: Tensor, seeds: Tensor) -> SplitScores:
    """Stages 2 and 3, from Float64[k n] cosines of the examples at Int64[k] `seeds` with all n."""
    among = cosines[:, seeds].clone().fill_diagonal_(0)
    # Perron and Frobenius: the leading eigenvector of a non-negative matrix has one sign.
    weights = torch.linalg.eigh(((among + among.t()) / 2).clamp(min=0)).eigenvectors[:, -1].abs()
    if float(weights.sum()) <= 0 or len(seeds) == 1:
        weights = torch.ones(len(seeds), dtype=torch.float64)
    # A seed's cosine with itself says nothing.
    present = torch.ones(cosines.shape, dtype=torch.float64)
    present[torch.arange(len(seeds)), seeds] = 0
    weighted = weights[:, None] * present
    total = weighted.sum(0)
    scores = (weighted * cosines).sum(0) / torch.where(total > 0, total, 1)
    return SplitScores(scores, valley(scores))


def _products(search: Search, examples: Examples, seeds: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Float64[k n] and Float64[n]: u_j^T P u_k and u_j^T P m, exactly, of all j and the seeds k."""

    def influence(queries: Tensor, combine: Tensor, scored: Examples) -> tuple[Tensor, Tensor]:
        inputs, labels = examples.at(queries)
        found = search.influence(
            inputs,
            labels,
            combine=combine,
            examples=scored,
            gradient="measurement",
            self_influence=True,
            stage="seed expansion",
        )
        assert found.self_influence is not None
        length = found.self_influence.double().cpu().sqrt()
        return found.values.double().cpu(), torch.where(length > 0, 1 / length, 0)

    _, inverse = influence(drawn[:1], torch.ones(1, 1), examples.subset(drawn))
    combine = torch.eye(len(seeds) + 1, len(seeds) + len(drawn))
    combine[-1] = 0
    combine[-1, len(seeds) :] = inverse / len(drawn)
    values, inverse = influence(torch.cat([seeds, drawn]), combine, examples)
    values *= inverse
    return values[:-1] * inverse[seeds][:, None], values[-1]


def _centred(products: Tensor, mean: Tensor, seeds: Tensor, drawn: Tensor) -> Tensor:
    """Float64[k n]: centred cosines, from Float64[k n] u_j^T P u_k and Float64[n] u_j^T P m.

    Those of an example without a gradient are 0.
    """
    square = mean[drawn].mean()
    length = (1 - 2 * mean + square).clamp(min=1e-12).sqrt()
    inverse = torch.where((mean != 0) | (products != 0).any(0), 1 / length, 0)
    return (products - mean - mean[seeds][:, None] + square) * inverse * inverse[seeds][:, None]


def valley(values: Tensor) -> float:
    """The widest gap, as a ratio, between the bulk of Float[n] `values` and their minimum-error threshold.

    >>> round(valley(torch.tensor([0.00, 0.01, 0.02, 0.01, 0.0, 0.03, 0.12, 0.5, 0.6, 0.55])), 3)
    0.245
    """
    upper = minimum_error_threshold(values)
    bulk = values[values < upper].double()
    if not len(bulk):
        return upper
    median = bulk.median()
    edge = float(median + 3 * 1.4826 * (bulk - median).abs().median())
    tail = bulk[bulk > max(edge, 0.0)].sort().values
    over = values[values >= upper].double()
    if not len(tail) or not len(over):
        return upper
    # From the edge itself: when none of the clean lies beyond it, the first gap is the valley.
    start = tail.new_tensor([edge]) if edge > 0 else tail[:0]
    steps = torch.cat([start, tail, over.min()[None]])
    place = int((steps[1:] / steps[:-1]).argmax())
    return float((steps[place] * steps[place + 1]).sqrt())


def minimum_error_threshold(values: Tensor) -> float:
    """Where Float[n] `values` part into two groups, each taken as normal (Kittler and Illingworth).

    >>> round(minimum_error_threshold(torch.tensor([0.0, 0.1, 0.2, 0.1, 0.9, 1.0, 1.1])), 3)
    0.55
    """
    ordered = values.double().sort().values
    count = len(ordered)
    if count < 4:
        return float(ordered[0]) - 1 if count else 0.0
    below = torch.arange(1, count, dtype=torch.float64)
    above = count - below
    sums, squares = ordered.cumsum(0), ordered.square().cumsum(0)
    low, high = sums[:-1] / below, (sums[-1] - sums[:-1]) / above
    low_variance = squares[:-1] / below - low.square()
    high_variance = (squares[-1] - squares[:-1]) / above - high.square()
    # No group may be narrower than a thousandth of the whole: two equal values are not a group.
    least = 1e-3 * (ordered[-1] - ordered[0]).square() + 1e-300
    cost = (
        below * low_variance.clamp(min=least).log()
        + above * high_variance.clamp(min=least).log()
        - 2 * (below * below.log() + above * above.log())
    )
    # Each side needs two members to have a width at all.
    cost[0] = cost[-1] = torch.inf
    place = int(cost.argmin())
    return float((ordered[place] + ordered[place + 1]) / 2)
