"""Shared pattern: the examples of a label with the pattern that those with similar gradients have in common.

A trigger that is the same in all images is a mean that their contents do not have. With the covariance S of
inputs without it, its best linear test is the discriminant of Fisher ("The use of multiple measurements in
taxonomic problems", 1936), the matched filter in noise of covariance S. Of members M, taken for poison, each
example j of the label gets

    pattern_j = sum_k a_k (1 - L_jk) x_j^T S^-1 x_k / sum_k a_k (1 - L_jk),  k in M,

with x less the mean of the examples that are no members. L_jk is the likeness of `_near_duplicates`, 1 for
j = k, and a_k = 1 / sum_l L_kl: neither an example itself nor a near-duplicate speaks for it, and a series
of near-duplicates counts once. Stages:

1. S of 2,048 examples with other labels: most triggers are put on images of other classes, and an example
   that has a part in S would have a lower value than one that has none. It is shrunk towards a multiple of
   the identity by OAS (Chen, Wiesel, Eldar and Hero, "Shrinkage algorithms for MMSE covariance estimation",
   2010);
2. pattern_j of the examples of the label, cut in two as in the seed expansion; again with those above the cut
   as members, until they stay the same, eight times at most;
3. the pattern counts where the members are a minority, separated from the others, and hold half of the
   seeds: an attack without a fixed pattern, or with a faint one, gives none, and nothing changes;
4. the linear discriminant of both measures, pattern_j and the cosine of the seed expansion, between the
   members and the others; examples are flagged that are more likely members by it.

Inputs are reduced to at most 32 pixels a side, by means. Of a label with more than 8,192 examples only those
count that resemble the seeds most.

Cost for d numbers an input: q^2 d + q^3 / 3 multiplications for q = 2,048, n m d a round for n examples and m
members, up to 256; reading n + q examples. Memory: 8 d (n + q) + 8 q^2 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final, final

import torch
import torch.nn.functional as F
from torch import Tensor

from unpoison._seeds import generator
from unpoison.data import Examples
from unpoison.detectors._near_duplicates import NearDuplicates
from unpoison.detectors._search import Search
from unpoison.detectors._seed_expansion import SplitScores, valley

_SIDE: Final = 32
_DRAWN: Final = 2048
# Ten development networks of the sample and CIFAR-10 with a trigger gave 1.8 to 37 or, where the pattern is
# faint, no minority; of 120 groups of natural images of the sample and of CIFAR-10 (the nearest to one, the
# brightest, random ones), none that held half of its seeds gave more than 1.7.
_SEPARATED: Final = 1.75
_MOST_EXAMPLES: Final = 8192
_MOST_MEMBERS: Final = 256
_FEWEST_MEMBERS: Final = 5
_ROUNDS: Final = 8
_OF_SEEDS: Final = 0.5
_BATCH: Final = 128


def shared_pattern(
    search: Search, expansion: SplitScores, rows: Tensor, seeds: Tensor, near: NearDuplicates
) -> SplitScores | None:
    """Log-odds of having the pattern that the members of an expansion share; None where they share none.

    Arguments:
        search: the training set, and the seed of what is drawn.
        expansion: of the examples with one label.
        rows: Int64[n], their places in the training set.
        seeds: Int64[k], the places among them of the seeds.
        near: which examples are near-duplicates.
    """
    training_set, members = search.training_set, expansion.members
    if _numbers(training_set) == 0 or int(members.sum()) < _FEWEST_MEMBERS:
        return None
    chosen = expansion.scores.topk(min(_MOST_EXAMPLES, len(rows))).indices.sort().values
    # Of other labels, so that none of those that are scored has a part in the covariance.
    others = torch.ones(len(training_set), dtype=torch.bool).index_fill_(0, rows, False).nonzero()[:, 0]
    if not len(others):
        return None
    drawn = torch.randperm(len(others), generator=generator(search.seed, "shared pattern"))[:_DRAWN]
    noise = inputs_at(training_set, others[drawn].sort().values)
    likeness = near.likeness(training_set, rows[chosen])
    found = pattern_of(inputs_at(training_set, rows[chosen]), noise, members[chosen], likeness)
    if found is None:
        return None
    own = torch.isin(chosen, seeds[members[seeds]])
    holds = float(found.members[own].double().mean()) if own.any() else 0.0
    minority = 2 * int(found.members.sum()) <= len(chosen)
    if not minority or found.separation < _SEPARATED or holds < _OF_SEEDS:
        return None
    both = log_odds(torch.stack([expansion.scores[chosen], found.scores], 1), found.members)
    scores = torch.full((len(rows),), float(both.min()) - 1, dtype=torch.float64)
    scores[chosen] = both
    return SplitScores(scores, 0.0)


def pattern_bytes(training_set: Examples, largest_class: int) -> int:
    """What `shared_pattern` takes, for a label of `largest_class` examples."""
    count, drawn = min(largest_class, _MOST_EXAMPLES), min(len(training_set), _DRAWN)
    numbers = _numbers(training_set)
    return 8 * numbers * (count + drawn) + 8 * drawn**2 if numbers else 0


def pattern_of(
    inputs: Tensor, noise: Tensor, members: Tensor, likeness: Callable[[Tensor, Tensor], Tensor]
) -> SplitScores | None:
    """Stages 1 and 2; None where fewer than five members are left, or inputs are not finite or all equal.

    Arguments:
        inputs: Float32[n d].
        noise: Float32[q d], inputs without the pattern.
        members: Bool[n], which inputs are taken to have it.
        likeness: Float[a b] of Int64[a] and Int64[b] places: how far examples are near-duplicates, in [0, 1].
    """
    noise = noise - noise.mean(0)
    scale = float(noise.abs().max())
    if not 0 < scale < math.inf or not bool(inputs.isfinite().all()):
        return None
    inputs, inverse = inputs / scale, InverseCovariance(noise.div_(scale))
    found: SplitScores | None = None
    for _ in range(_ROUNDS):
        places = members.nonzero()[:, 0]
        if len(places) < _FEWEST_MEMBERS or len(places) == len(inputs):
            return None
        if len(places) > _MOST_MEMBERS and found is not None:
            places = places[found.scores[places].topk(_MOST_MEMBERS).indices].sort().values
        places = places[:: -(-len(places) // _MOST_MEMBERS)]
        centred = inputs - inputs[~members].mean(0)
        products = (centred @ inverse(centred[places]).t()).double()
        alike = likeness(torch.arange(len(inputs)), places).double()
        alike[places, torch.arange(len(places))] = 1
        weights = (1 - alike) / alike[places].sum(0)
        scores = (weights * products).sum(1) / weights.sum(1).clamp(min=1e-12)
        found = SplitScores(scores, valley(scores))
        if torch.equal(found.members, members):
            break
        members = found.members
    return found


def log_odds(points: Tensor, members: Tensor) -> Tensor:
    """Float64[n] of Float64[n p] points: of being one of Bool[n] members, by the linear discriminant.

    Members and others are taken as normal, with one covariance.

    >>> points = torch.tensor([[0.0], [0.2], [0.1], [0.9], [1.1], [0.5]], dtype=torch.float64)
    >>> (log_odds(points, points[:, 0] > 0.8) > 0).tolist()
    [False, False, False, True, True, False]
    """
    inside, outside = points[members], points[~members]
    middle = (inside.mean(0) + outside.mean(0)) / 2
    within = torch.cat([inside - inside.mean(0), outside - outside.mean(0)])
    covariance = within.t() @ within / len(points)
    covariance.diagonal().mul_(1 + 1e-6).add_(1e-12)
    direction = torch.linalg.solve(covariance, inside.mean(0) - outside.mean(0))
    values: Tensor = (points - middle) @ direction
    return values + math.log(len(inside) / len(outside))


@final
class InverseCovariance:
    """Products with the inverse of the covariance of Float32[q d] inputs without their mean, shrunk by OAS.

    By the identity of Woodbury this takes a matrix of q numbers a side in place of one of d.
    """

    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs
        count, width = inputs.shape
        gram = self.inputs @ self.inputs.t() / count
        trace, square = float(gram.trace()), float(gram.square().sum())
        shared = (1 - 2 / width) * square + trace**2
        spread = (count + 1 - 2 / width) * (square - trace**2 / width)
        share = min(shared / spread, 1 - 1e-6) if spread > 0 else 1 - 1e-6
        self.sample, self.ridge = 1 - share, share * trace / width
        gram.diagonal().add_(self.ridge / self.sample)
        self.factor = torch.linalg.cholesky(gram)

    def __call__(self, vectors: Tensor) -> Tensor:
        """Float32[m d] of Float32[m d]."""
        inside = torch.cholesky_solve(self.inputs @ vectors.t() / len(self.inputs), self.factor)
        return (vectors - inside.t() @ self.inputs) / self.ridge


def inputs_at(examples: Examples, rows: Tensor) -> Tensor:
    """Float32[m d]: the inputs at Int64[m] `rows`, in batches; images of at most 32 pixels a side."""
    parts = []
    for inputs, *_ in examples.in_batches(_BATCH, rows):
        part = inputs.float()
        if part.ndim == 4 and max(part.shape[2:]) > _SIDE:
            part = F.adaptive_avg_pool2d(part, (min(part.shape[2], _SIDE), min(part.shape[3], _SIDE)))
        parts.append(part.flatten(1).cpu())
    return torch.cat(parts)


def _numbers(examples: Examples) -> int:
    """How many numbers `inputs_at` gives of an example; 0 where inputs are no images or real vectors."""
    shape = examples.input_shape
    if isinstance(shape, Mapping) or len(shape) not in (1, 3):
        return 0
    inputs = examples.batch(0, 1)[0]
    if not (isinstance(inputs, Tensor) and inputs.is_floating_point()):
        return 0
    return math.prod(shape if len(shape) == 1 else (shape[0], min(shape[1], _SIDE), min(shape[2], _SIDE)))
