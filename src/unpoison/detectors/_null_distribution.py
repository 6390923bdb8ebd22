"""How much more is an example blamed for the suspect than for innocent inputs?

The collapse of influence differs from example to example for reasons that have nothing to do with poison:
examples near a class border are blamed for everything. So the calibrated rule of Delta-Influence asks the
same question about m innocent inputs, the null distribution, and compares:

1. excess       z_j = (c_j - mean over the null of c_j) / (standard deviation over the null of c_j + s0), for
                every training example j; s0, the median of these deviations, keeps examples that are hardly
                ever blamed from looking extreme (as in Tusher, Tibshirani and Chu, 2001).
2. verdict      how far the k-th largest excess lies above what it is for the null inputs, each compared with
                the other m - 1, is known for several k; the statistic is the largest fall from one k to a
                deeper one. Poison is few and stands out alone: behind the last of it the excess falls to what
                it is for anybody. A hard example leans on much of its class, so that its excess is high at
                every depth. The p-value is the rank among the null inputs, never below 1 / (m + 1). Asked
                once of all examples and once of the likely, which an odd null input that is blamed on others
                does not disturb, it is twice the smaller of the two (Bonferroni). For an exchangeable suspect
                it is right within the error of simulation from some twenty null inputs on; with very few it
                is too small, as centre and spread are those of the null inputs alone.
3. flags        the lowest threshold above which the examples that a null input puts there are, on average, at
                most a given share of those the suspect puts there: the empirical false discovery rate
                (Storey, 2002), among the likely and, at a tenth of that share, among the others (Sun, Craiu,
                Paterson and Bull, "Stratified false discovery control", 2006). Poison mostly bears the label
                that it causes; with one threshold the many that do not would decide about the few that do.

Cost: sorting, (m + 1) n log n.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

# The statistic looks at the k-th largest excess for k at these shares of the training set: poison budgets,
# and a depth below which there is none.
_SHARES = (0.0006, 0.001, 0.002, 0.004, 0.01, 0.02, 0.04, 0.1)
# How much less likely an example is to blame that does not bear the label.
_OTHERS = 0.1


@final
@dataclass(frozen=True, eq=False)
class Excess:
    """What `compare` finds.

    Arguments:
        excess: Float[n], how much more each example is blamed for the suspect than for innocent inputs.
        p_value: how often an innocent input would look at least as guilty.
        p_value_of_likely: the same, asked of the likely alone; `p_value` itself where there are none.
        statistic: the largest fall of the suspect, in standard deviations over the null inputs; of the group
            in which it ranks higher.
        threshold: excess above which the likely are flagged; infinite when none can be.
        blamed: Bool[n], what is above the threshold of its group.
    """

    excess: Tensor
    p_value: float
    p_value_of_likely: float
    statistic: float
    threshold: float
    blamed: Tensor


def compare(
    suspect: Tensor,
    null: Tensor,
    *,
    false_discoveries: float,
    ignore: Tensor | None = None,
    likely: Tensor | None = None,
) -> Excess:
    """Compare the collapses of the suspect with those of innocent inputs.

    Arguments:
        suspect: Float[n], the collapse of every training example for the suspect.
        null: Float[m, n], the same for m innocent inputs, m at least 3, in the same unit.
        false_discoveries: the share of the flagged that may be innocent, in (0, 1).
        ignore: Int64[m], for null inputs that are training examples themselves: whose collapse to leave out.
            -1 for none.
        likely: Bool[n], the examples that are to blame more likely than others; all by default.
    """
    suspect, null = suspect.double(), null.double()
    if ignore is not None:
        rows = (ignore >= 0).nonzero()[:, 0]
        others = null.clone()
        others[rows, ignore[rows]] = torch.nan
        null = torch.where(others.isnan(), others.nanmean(0), null)
    count, examples = null.shape
    mean, deviation = null.mean(0), null.std(0)
    fudge = deviation.median()
    if not fudge > 0:  # most examples are never blamed for anything
        fudge = deviation.mean() if deviation.any() else deviation.new_ones(())
    excess = (suspect - mean) / (deviation + fudge)

    # Each null input against the other m - 1, from the running sums.
    rest = (null.sum(0) - null) / (count - 1)
    squares = (null.square().sum(0) - null.square()) / (count - 1)
    rest_deviation = ((squares - rest.square()).clamp(min=0) * (count - 1) / (count - 2)).sqrt()
    null_excess = (null - rest) / (rest_deviation + fudge)

    every = torch.cat([excess[None], null_excess])
    depths = {round(share * examples) for share in _SHARES}
    falls = [_falls(every, depths, examples)]
    if likely is None:
        likely = torch.ones(examples, dtype=torch.bool, device=excess.device)
    elif likely.any():
        # Deeper than half of a group nothing stands out.
        falls.append(_falls(every[:, likely], depths, -(-int(likely.sum()) // 2)))
    ranks = [1 + int((fall[1:] >= fall[0]).sum()) for fall in falls]
    p_values = [min(1.0, len(falls) * rank / (count + 1)) for rank in ranks]
    statistic = float(falls[ranks.index(min(ranks))][0])

    threshold = _threshold(excess[likely], null_excess[:, likely], false_discoveries)
    of_others = _threshold(excess[~likely], null_excess[:, ~likely], false_discoveries * _OTHERS)
    blamed = excess > torch.where(likely, threshold, of_others)
    return Excess(excess, min(p_values), p_values[-1], statistic, threshold, blamed)


def _falls(excess: Tensor, depths: set[int], deepest: int) -> Tensor:
    """Float[m]: the statistic of each row of Float[m n], the first of which is the suspect's."""
    places = sorted({min(max(3, depth), deepest) for depth in depths})
    tops = excess.topk(places[-1], dim=1).values[:, [place - 1 for place in places]]
    centre, spread = tops[1:].mean(0), tops[1:].std(0) + 0.05
    return _largest_fall((tops - centre) / spread)


def _largest_fall(heights: Tensor) -> Tensor:
    """Float[m] of Float[m k]: the most by which a later number of a row lies below an earlier one.

    Of a single depth there is no fall, and its height is taken.
    """
    if heights.shape[1] == 1:
        return heights[:, 0]
    lowest_after = heights.flip(1).cummin(1).values.flip(1)[:, 1:]
    return (heights[:, :-1] - lowest_after).amax(1)


def _threshold(excess: Tensor, null_excess: Tensor, false_discoveries: float) -> float:
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
