"""The decision of `calibrated`: a conformal p-value of the query against calibration inputs, and seeds.

How far the influence of an example collapses differs from example to example for reasons that have nothing to
do with poison: examples near a class border react to every query. So the collapses for the query are compared
with those for m calibration inputs:

1. excess       z_j = (c_j - mean over the calibration inputs) / (standard deviation over them + s0), for
                every training example j; s0, the median of these deviations, keeps examples that hardly ever
                react from looking extreme (as in Tusher, Tibshirani and Chu, 2001).
2. p-value      of the drop statistic: how far the k-th largest excess lies above what it is for the
                calibration inputs, each compared with the other m - 1, is known for several k; the statistic
                is the largest drop from one k to a deeper one. Poison is few: behind the last of it the
                excess falls to what it is for any input. A hard example rests on much of its class, so that
                its excess is high at every depth. The p-value is the rank among the calibration inputs, never
                below 1 / (m + 1) (a conformal p-value; Vovk, Gammerman and Shafer, 2005). Computed over all
                examples and over the likely ones, it is twice the smaller of the two (Bonferroni). It is
                valid for a query exchangeable with the calibration inputs, within the error of simulation
                from some twenty of them on; with very few it is too small, as centre and spread are estimated
                from the calibration inputs alone.
3. selection    the lowest threshold above which the examples that a calibration input puts there are, on
                average, at most a given share of those the query puts there: the empirical false discovery
                rate (Storey, 2002), among the likely and, at a tenth of that share, among the others (Sun,
                Craiu, Paterson and Bull, "Stratified false discovery control", 2006). Poison mostly has the
                label that it causes; one threshold for all would let the many others decide about the few.
4. seeds        the upper half of the selected examples where p is at most the level. Where p is above it and
                at most .5, the ten likely examples of largest excess: seed expansion then decides whether
                they belong to a separated group.

Cost: sorting, (m + 1) n log n.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

# The drop statistic looks at the k-th largest excess for k at these shares of the training set: poison
# budgets, and a depth below which there is none.
_SHARES = (0.0006, 0.001, 0.002, 0.004, 0.01, 0.02, 0.04, 0.1)
# The share of false discoveries allowed among the other examples, relative to that among the likely ones.
_OTHERS = 0.1
# Up to this p-value seed expansion may still find poison, from so many seeds.
_DOUBT = 0.5
_DOUBTFUL_SEEDS = 10


@final
@dataclass(frozen=True, eq=False)
class Decision:
    """What `decide` finds.

    Arguments:
        excess: Float64[n], how much more the influence of each example collapses than for calibration inputs.
        p_value: how often a calibration input has at least the drop statistic of the query.
        found: whether the p-value is at most the level and some examples are selected.
        seeds: Int64[k], the examples to expand from, the largest excess first. Where nothing is found, but
            the p-value is at most .5, those that may turn out to be a separated group; else none.
        threshold: the excess above which likely examples are selected; infinite when none can be.
    """

    excess: Tensor
    p_value: float
    found: bool
    seeds: Tensor
    threshold: float


def decide(
    query: Tensor,
    calibration: Tensor,
    likely: Tensor,
    *,
    level: float,
    false_discoveries: float,
    ignore: Tensor | None = None,
) -> Decision:
    """Whether the query goes back to poison, and the examples that it goes back to most surely.

    Arguments:
        query: Float[n], the normalised collapse of every training example for the query.
        calibration: Float[m n], the same for m calibration inputs, m at least 3, in the same unit.
        likely: Bool[n], the examples with the label of the query.
        level: the p-value at which poison is found, in (0, 1).
        false_discoveries: see `compare`.
        ignore: see `compare`.
    """
    outcome = compare(query, calibration, false_discoveries=false_discoveries, ignore=ignore, likely=likely)
    level = level + 1e-9  # division may put 1 / 100 a rounding error above .01
    selected = outcome.selected
    if outcome.p_value_of_likely <= level and bool((selected & likely).any()):
        # Where the label's own examples suffice, others are selected for resembling the query.
        selected = selected & likely
    found = outcome.p_value <= level and bool(selected.any())
    ranking = outcome.excess.argsort(descending=True, stable=True)
    seeds = ranking[selected[ranking]]
    if found:
        seeds = seeds[: max(1, len(seeds) // 2)]
    elif outcome.p_value <= _DOUBT:
        seeds = ranking[likely[ranking]][:_DOUBTFUL_SEEDS]
    else:
        seeds = seeds[:0]
    return Decision(outcome.excess, outcome.p_value, found, seeds, outcome.threshold)


@final
@dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare` finds.

    Arguments:
        excess: Float64[n], see `Decision`.
        p_value: see `Decision`.
        p_value_of_likely: the same over the likely examples alone; `p_value` itself where there are none.
        statistic: the drop statistic of the query, in standard deviations over the calibration inputs; of the
            group in which it ranks higher.
        threshold: see `Decision`.
        selected: Bool[n], the examples above the threshold of their group.
    """

    excess: Tensor
    p_value: float
    p_value_of_likely: float
    statistic: float
    threshold: float
    selected: Tensor


def compare(
    query: Tensor,
    calibration: Tensor,
    *,
    false_discoveries: float,
    ignore: Tensor | None = None,
    likely: Tensor | None = None,
) -> Comparison:
    """Compare the collapses for the query with those for calibration inputs.

    Arguments:
        query: Float[n], the collapse of every training example for the query.
        calibration: Float[m n], the same for m calibration inputs, m at least 3, in the same unit.
        false_discoveries: the share of the selected examples that may be clean, in (0, 1).
        ignore: Int64[m], of calibration inputs that are training examples: the example itself, whose collapse
            is left out; -1 for none.
        likely: Bool[n], the examples that are more likely poison than others; all by default.
    """
    query, calibration = query.double(), calibration.double()
    if ignore is not None:
        rows = (ignore >= 0).nonzero()[:, 0]
        others = calibration.clone()
        others[rows, ignore[rows]] = torch.nan
        calibration = torch.where(others.isnan(), others.nanmean(0), calibration)
    count, examples = calibration.shape
    mean, deviation = calibration.mean(0), calibration.std(0)
    fudge = deviation.median()
    if not fudge > 0:  # most examples never react
        fudge = deviation.mean() if deviation.any() else deviation.new_ones(())
    excess = (query - mean) / (deviation + fudge)

    # Each calibration input against the other m - 1, from the running sums.
    rest = (calibration.sum(0) - calibration) / (count - 1)
    squares = (calibration.square().sum(0) - calibration.square()) / (count - 1)
    rest_deviation = ((squares - rest.square()).clamp(min=0) * (count - 1) / (count - 2)).sqrt()
    null_excess = (calibration - rest) / (rest_deviation + fudge)

    every = torch.cat([excess[None], null_excess])
    depths = {round(share * examples) for share in _SHARES}
    drops = [_drops(every, depths, examples)]
    if likely is None:
        likely = torch.ones(examples, dtype=torch.bool, device=excess.device)
    elif likely.any():
        # Deeper than half of a group nothing is an outlier.
        drops.append(_drops(every[:, likely], depths, -(-int(likely.sum()) // 2)))
    ranks = [1 + int((drop[1:] >= drop[0]).sum()) for drop in drops]
    p_values = [min(1.0, len(drops) * rank / (count + 1)) for rank in ranks]
    statistic = float(drops[ranks.index(min(ranks))][0])

    threshold = _threshold(excess[likely], null_excess[:, likely], false_discoveries)
    of_others = _threshold(excess[~likely], null_excess[:, ~likely], false_discoveries * _OTHERS)
    selected = excess > torch.where(likely, threshold, of_others)
    return Comparison(excess, min(p_values), p_values[-1], statistic, threshold, selected)


def _drops(excess: Tensor, depths: set[int], deepest: int) -> Tensor:
    """Float[m]: the drop statistic of each row of Float[m n]; the first row is the query's."""
    places = sorted({min(max(3, depth), deepest) for depth in depths})
    tops = excess.topk(places[-1], dim=1).values[:, [place - 1 for place in places]]
    centre, spread = tops[1:].mean(0), tops[1:].std(0) + 0.05
    return _largest_drop((tops - centre) / spread)


def _largest_drop(heights: Tensor) -> Tensor:
    """Float[m] of Float[m k]: the most by which a later number of a row lies below an earlier one.

    With a single depth there is no drop, and its height is taken.
    """
    if heights.shape[1] == 1:
        return heights[:, 0]
    lowest_after = heights.flip(1).cummin(1).values.flip(1)[:, 1:]
    return (heights[:, :-1] - lowest_after).amax(1)


def _threshold(excess: Tensor, null_excess: Tensor, false_discoveries: float) -> float:
    """The lowest threshold with so few expected false discoveries; infinite when there is none."""
    if not len(excess):
        return float("inf")
    ordered = excess.sort(descending=True).values
    null_ordered = null_excess.flatten().sort().values
    expected = (null_ordered.numel() - torch.searchsorted(null_ordered, ordered)) / len(null_excess)
    rate = expected / torch.arange(1, len(ordered) + 1, device=ordered.device)
    allowed = (rate <= false_discoveries).nonzero()
    if not len(allowed):
        return float("inf")
    last = int(allowed[-1])
    following = ordered[last + 1] if last + 1 < len(ordered) else ordered[last] - 1
    return float((ordered[last] + following) / 2)
