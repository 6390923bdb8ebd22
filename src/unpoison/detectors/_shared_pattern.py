"""Shared pattern: what the inputs of examples have in common, who else has it, and whether an input does.

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
   as members, until they stay the same, eight times at most. Fewer than five members, which is the sum of
   their a_k, give none;
3. the pattern counts where the members are a minority, separated from the others, and hold half of the
   seeds: an attack without a fixed pattern, or with a faint one, gives none, and nothing changes.

It is asked twice:

- for the test (`Patterns.carried`), with the examples that stand out for an input as the first members: does
  that input itself lie above the cut, as one with a trigger does?
- for the flags (`shared_pattern`), with those of the seed expansion: the linear discriminant of both
  measures, pattern_j and the cosine, between the members and the others. Examples are flagged that are more
  likely members by it, provided that the pattern separates its members further than the cosine does.

Inputs are reduced to at most 32 pixels a side, by means. Of a label with more than 8,192 examples only those
count that resemble the seeds, or stand out, most.

Cost for d numbers an input: q^2 d + q^3 / 3 multiplications a label for q = 2,048, and reading n + q
examples; n m d a round for n examples and m members, up to 256. Memory: 8 d (n + q) + 8 q^2 bytes, twice
where inputs with several labels are asked about.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Self, final

import torch
import torch.nn.functional as F
from torch import Tensor

from unpoison._inputs import count_of
from unpoison._seeds import generator
from unpoison.data import Examples
from unpoison.data import Inputs as Given
from unpoison.detectors._conformal import FEWEST_SEEDS, RESPONSIBLE, SEED
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


@final
@dataclass(frozen=True, eq=False)
class Pattern:
    """A pattern that some examples share.

    Arguments:
        split: how much of it the examples have, and which are its members.
        centre: Float32[d], the mean of the others.
        direction: Float32[d], what is multiplied with an input less the centre.
        scale: by which inputs are divided.
    """

    split: SplitScores
    centre: Tensor
    direction: Tensor
    scale: float

    def counts(self, seeds: Tensor) -> bool:
        """Stage 3, for seeds at Int64[k] among the examples."""
        members = self.split.members
        held = float(members[seeds].double().mean()) if len(seeds) else 0.0
        minority = 2 * int(members.sum()) <= len(members)
        return minority and self.split.separation >= _SEPARATED and held >= _OF_SEEDS

    def carried_by(self, inputs: Tensor) -> bool:
        """Whether Float32[m d] inputs have it, in the mean."""
        found = (inputs / self.scale - self.centre) @ self.direction
        return float(found.double().mean()) > self.split.threshold


@final
class Discriminant:
    """Stages 1 and 2.

    Arguments:
        inputs: Float32[n d].
        noise: Float32[q d], inputs without the pattern.
        likeness: Float[a b] of Int64[a] and Int64[b] places: how far examples are near-duplicates, in [0, 1].
    """

    def __init__(self, inputs: Tensor, noise: Tensor, likeness: Callable[[Tensor, Tensor], Tensor]) -> None:
        noise = noise - noise.mean(0)
        self.scale = float(noise.abs().max())
        self._likeness = likeness
        self._usable = 0 < self.scale < math.inf and bool(inputs.isfinite().all())
        if self._usable:
            self._inputs, self._inverse = inputs / self.scale, InverseCovariance(noise.div_(self.scale))

    def pattern(self, members: Tensor) -> Pattern | None:
        """The pattern of Bool[n] members, in the first round.

        None where fewer than five members are left, a series of near-duplicates counted once, or inputs are
        not finite or all equal.
        """
        if not self._usable:
            return None
        inputs, found = self._inputs, None
        for _ in range(_ROUNDS):
            places = members.nonzero()[:, 0]
            if len(places) < _FEWEST_MEMBERS or len(places) == len(inputs):
                return None
            if len(places) > _MOST_MEMBERS and found is not None:
                places = places[found.split.scores[places].topk(_MOST_MEMBERS).indices].sort().values
            places = places[:: -(-len(places) // _MOST_MEMBERS)]
            centre = inputs[~members].mean(0)
            centred = inputs - centre
            filters = self._inverse(centred[places])
            alike = self._likeness(torch.arange(len(inputs)), places).double()
            alike[places, torch.arange(len(places))] = 1
            shares = 1 / alike[places].sum(0)
            if float(shares.sum()) < _FEWEST_MEMBERS - 1e-6:  # a few series are a few examples
                return None
            weights = (1 - alike) * shares
            products = (centred @ filters.t()).double()
            scores = (weights * products).sum(1) / weights.sum(1).clamp(min=1e-12)
            direction = (shares / shares.sum()).float() @ filters
            found = Pattern(SplitScores(scores, valley(scores)), centre, direction, self.scale)
            if torch.equal(found.split.members, members):
                break
            members = found.split.members
        return found


@final
@dataclass(frozen=True, eq=False)
class LabelInputs:
    """The inputs of the examples with one label, and the discriminant against those with others.

    Arguments:
        chosen: Int64[k], which of the n examples with the label.
        discriminant: of these.
    """

    chosen: Tensor
    discriminant: Discriminant

    @classmethod
    def of(cls, search: Search, rows: Tensor, near: NearDuplicates, scores: Tensor) -> Self | None:
        """Of the examples at Int64[n] `rows`, of many those with the largest Float[n] `scores`.

        None where inputs are no images or real vectors, or there is no other label.
        """
        training_set = search.training_set
        # Of other labels, so that none of those that are scored has a part in the covariance.
        others = torch.ones(len(training_set), dtype=torch.bool).index_fill_(0, rows, False).nonzero()[:, 0]
        if _numbers(training_set) == 0 or not len(others):
            return None
        chosen = scores.topk(min(_MOST_EXAMPLES, len(rows))).indices.sort().values
        drawn = torch.randperm(len(others), generator=generator(search.seed, "shared pattern"))[:_DRAWN]
        noise = inputs_at(training_set, others[drawn].sort().values)
        likeness = near.likeness(training_set, rows[chosen])
        return cls(chosen, Discriminant(inputs_at(training_set, rows[chosen]), noise, likeness))


@final
class Patterns:
    """The patterns of one search; what belongs to the two labels that were asked about last is kept."""

    def __init__(self, search: Search, near: NearDuplicates) -> None:
        self._search, self._near = search, near
        self._known: dict[int, LabelInputs | None] = {}

    def label(self, label: int, rows: Tensor, scores: Tensor) -> LabelInputs | None:
        """`LabelInputs.of`, kept where it has all examples of the label."""
        if label in self._known:
            return self._known[label]
        while len(self._known) > 1:  # that of the answer comes first, and is needed again
            self._known.popitem()
        found = LabelInputs.of(self._search, rows, self._near, scores)
        if len(rows) <= _MOST_EXAMPLES:
            self._known[label] = found
        return found

    def carried(self, label: int, inputs: Tensor, places: Tensor, weights: Tensor) -> bool:
        """Whether what stands out for an input shares a pattern that the input has, too.

        Arguments:
            label: that the input is asked about.
            inputs: Float32[m d], reduced; several are one query.
            places: Int64[k], the training examples that stand out most for it, the first most.
            weights: Float64[k], `responsible` of `_conformal`.
        """
        places, weights = places[weights > 0], weights[weights > 0]
        if len(places) < _FEWEST_MEMBERS or not inputs.shape[1]:
            return False
        rows = (self._search.training_set.labels.cpu() == label).nonzero()[:, 0]
        excess = torch.zeros(len(rows), dtype=torch.float64)
        excess[torch.searchsorted(rows, places)] = weights
        known = self.label(label, rows, excess)
        if known is None:
            return False
        found = known.discriminant.pattern(excess[known.chosen] > 0)
        seeds = excess[known.chosen].argsort(descending=True, stable=True)
        seeds = seeds[: max(FEWEST_SEEDS, int((weights > SEED - RESPONSIBLE).sum()))]
        return found is not None and found.counts(seeds) and found.carried_by(inputs)


def shared_pattern(known: LabelInputs | None, expansion: SplitScores, seeds: Tensor) -> SplitScores | None:
    """Log-odds of having the pattern that the members of an expansion share; None where they share none.

    Arguments:
        known: the inputs of the n examples with one label.
        expansion: of these.
        seeds: Int64[k], the places among them of the seeds.
    """
    members = expansion.members
    if known is None or int(members.sum()) < _FEWEST_MEMBERS:
        return None
    chosen = known.chosen
    found = known.discriminant.pattern(members[chosen])
    own = torch.isin(chosen, seeds[members[seeds]]).nonzero()[:, 0]
    if found is None or not found.counts(own) or found.split.separation <= expansion.separation:
        return None
    both = log_odds(torch.stack([expansion.scores[chosen], found.split.scores], 1), found.split.members)
    scores = torch.full((len(members),), float(both.min()) - 1, dtype=torch.float64)
    scores[chosen] = both
    return SplitScores(scores, 0.0)


def pattern_bytes(training_set: Examples, largest_class: int) -> int:
    """What the patterns of two labels of `largest_class` examples take."""
    count, drawn = min(largest_class, _MOST_EXAMPLES), min(len(training_set), _DRAWN)
    numbers = _numbers(training_set)
    return 2 * (8 * numbers * (count + drawn) + 8 * drawn**2) if numbers else 0


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
    return torch.cat([reduced(inputs) for inputs, *_ in examples.in_batches(_BATCH, rows)])


def reduced(inputs: Given) -> Tensor:
    """Float32[m d] of m inputs, images of at most 32 pixels a side; no numbers of other inputs."""
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or inputs.ndim not in (2, 4):
        return torch.zeros(count_of(inputs), 0)
    found = inputs.detach().float()
    if found.ndim == 4 and max(found.shape[2:]) > _SIDE:
        found = F.adaptive_avg_pool2d(found, (min(found.shape[2], _SIDE), min(found.shape[3], _SIDE)))
    return found.flatten(1).cpu()


def _numbers(examples: Examples) -> int:
    """How many numbers `inputs_at` gives of an example; 0 where inputs are no images or real vectors."""
    shape = examples.input_shape
    if isinstance(shape, Mapping) or len(shape) not in (1, 3):
        return 0
    return reduced(examples.batch(0, 1)[0]).shape[1]
