"""The decision of `calibrated`: is an answer responsible to more unrelated examples than an honest error is?

Given are the normalised collapses x_j (`_collapse`) of the n_y training examples with the answered label.

1. excess      z_j = (x'_j - c_j) / (s_j + median s), where x' is x in robust standard deviations (median,
               1.4826 MAD) and c_j and s_j are the mean and the standard deviation of the same at baseline
               inputs with that label: correct answers and inputs nearest to them. Examples near a class
               border react to every query; the constant keeps those that hardly ever react from looking
               extreme (Tusher, Tibshirani and Chu, 2001). z is brought to robust deviations again.
2. statistic   T = sum over j of sqrt((z_j - 3)+) / m_j^2 with the multiplicities m_j of
               `_near_duplicates`: how many unrelated examples stand out, and, by the root, how far. A
               natural error goes back to few examples, to one series of near-duplicates, or a little to all
               of its class; the square makes a series count the less the longer it is.
3. pattern     whether the input carries a pattern that the examples with z_j > 3 share (`_shared_pattern`).
               Inputs that carry one rank above those that do not, whatever T.
4. p-value     the rank among calibration errors: inputs that the model classifies wrongly, each asked
               about its own wrong answer. For a natural error, which is one more of them, it is uniform
               (a conformal p-value; Vovk, Gammerman and Shafer, 2005), whatever the statistic. It is one
               test, so the level is not shared. Near-errors, which fill up where errors are few, are a little
               less extreme; unless it ranks above all errors, p is at least its rank among errors alone.
               With e errors that are fewer than the level takes, 1 / (e + 1) bounds the false alarms for
               certain, and the level does as far as near-errors are like errors.
               No error is left out because it goes back to the same examples as the answer: natural errors
               share causes, too, and without the errors that resemble it most any error is more extreme.

Several inputs are one query, of their mean gradient. It is ranked among single errors, of which it is not one
more; on natural errors with one answer it has been compared in small trials alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

# Chosen on the development networks of `_decision`; docs/delta_influence.md has the power with each of them
# halved and doubled.
RESPONSIBLE: Final = 3.0
"""The excess from which an example stands out."""
SEED: Final = 6.0
"""The excess from which an example may be a seed of the expansion."""
FEWEST_SEEDS: Final = 5
"""So many seeds are taken at least."""


def robust_units(values: Tensor) -> tuple[Tensor, Tensor]:
    """Float64[... 1] each: the median of Float[... n], and 1.4826 times the median absolute deviation.

    Where more than half of the values are equal, the standard deviation in its place; never 0.
    """
    values = values.double()
    centre = values.median(-1, keepdim=True).values
    unit = 1.4826 * (values - centre).abs().median(-1, keepdim=True).values
    spread = (values - values.mean(-1, keepdim=True)).square().mean(-1, keepdim=True).sqrt()
    unit = torch.where(unit > 1e-6 * spread, unit, spread)
    return centre, torch.where(unit > 0, unit, 1)


def standardised(values: Tensor) -> Tensor:
    """Float64[... n] minus the median, in robust units.

    >>> standardised(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])).tolist()
    [-1.348..., -0.674..., 0.0, 0.674..., 1.348...]
    """
    centre, unit = robust_units(values)
    return (values.double() - centre) / unit


@final
@dataclass(frozen=True, eq=False)
class Baseline:
    """What the collapses of examples are at baseline inputs: Float64[n] centre and spread."""

    centre: Tensor
    spread: Tensor

    @classmethod
    def of(cls, collapses: Tensor) -> Baseline:
        """From Float64[b n] of the baseline inputs of one label; neutral where there are fewer than two."""
        if len(collapses) < 2:
            neutral = torch.zeros(collapses.shape[1], dtype=torch.float64)
            return cls(neutral, neutral + 1)
        values = standardised(collapses)
        spread = values.std(0, correction=0)
        return cls(values.mean(0), (spread + spread.median()).clamp(min=1e-6))

    def excess(self, collapses: Tensor) -> Tensor:
        """Float64[... n], stage 1."""
        return standardised((standardised(collapses) - self.centre) / self.spread)


def statistic(excess: Tensor, multiplicities: Tensor) -> Tensor:
    """Float64[...] of Float64[... n] excess, stage 2; what does not stand out needs no multiplicity.

    >>> twice = torch.tensor([1.0, 1.0, 2.0, 2.0])
    >>> float(statistic(torch.tensor([4.0, 0.0, 4.0, 4.0]), twice))
    1.5
    """
    return ((excess.double() - RESPONSIBLE).clamp(min=0).sqrt() / multiplicities.square()).sum(-1)


def responsible(excess: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Int64[m count] places and Float64[m count] weights of what stands out most; 0 where nothing does."""
    weights = (excess - RESPONSIBLE).clamp(min=0)
    top = weights.topk(min(count, weights.shape[1]), dim=1)
    return top.indices, top.values


def errors_needed(level: float) -> int:
    """How many calibration errors a false-alarm level takes: the least m with 1 / (m + 1) at most the level.

    >>> errors_needed(0.01)
    99
    """
    return math.ceil(1 / level - 1e-9) - 1


def least_level(errors: int) -> float:
    """The least level that so many calibration errors allow, rounded up to a thousandth.

    >>> least_level(60)
    0.017
    """
    return math.ceil(1000 / (errors + 1)) / 1000


def p_value(as_extreme: Tensor) -> float:
    """The conformal p-value, of Bool[m]: which calibration errors are at least as extreme.

    >>> p_value(torch.arange(99.0) >= 97.5)
    0.02
    """
    return (1 + int(as_extreme.sum())) / (len(as_extreme) + 1)
