"""Which examples pull the model the same way as those that are surely to blame?

One suspect blames the poisons that resemble it most. All poisons of one attack share a cause, though, and
so a direction: in the metric of the inverse curvature P, the cosine between two training gradients

    cos(j, k) = g_j^T P g_k / sqrt(g_j^T P g_j  g_k^T P g_k)

is high between poisons and near zero between a poison and a clean example of the same class. Stages:

1. cosines of every example with at most 64 of the surest;
2. their weights: the leading eigenvector of the cosines among the surest, so that a few innocent ones among
   them, which have no company there, carry next to nothing;
3. score = weighted mean cosine; the threshold is where the examples labelled like the surest part into two
   groups: first by minimum error (Kittler and Illingworth, "Minimum error thresholding", 1986), which takes
   both groups as normal; then, because the poison that least resembles the rest makes a long lower tail, down
   to the widest gap, as a ratio, between that and the bulk of the clean.

Cost: one pass over the training set. Memory: as many queries as there are surest, at most 64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from unpoison._progress import Progress
from unpoison.data import TrainingSet
from unpoison.influence import Batch, ClassificationTask, Damping, Factors, Task, precondition, score

_MOST = 64
# How far those who pull the same way must stand out to be a group of their own. Chosen from a trial that is
# not kept: of 2,637 questions about two networks trained on clean data two gave as much and the next 1.84;
# three cases of gradient matching, whose poisons hardly pull alike, about 1.5.
_CLEARLY = 2.0


@final
@dataclass(frozen=True, eq=False)
class Company:
    """Float[n] weighted mean cosines with the surest, in [-1, 1], the threshold, and Bool[n] who may be it.

    `alike` are the examples with a label that at least a tenth of the surest carry.
    """

    scores: Tensor
    threshold: float
    alike: Tensor

    @property
    def pulling(self) -> Tensor:
        """Bool[n]: who pulls the same way."""
        return self.alike & (self.scores > self.threshold)

    @property
    def standing_out(self) -> float:
        """How far nine in ten of those who pull the same way lie from the median of the others like them.

        In units of how far these others' ninety-ninth percentile lies from it; infinite where there are no
        others, minus infinity where nobody pulls.
        """
        pulling, others = self.scores[self.pulling], self.scores[self.alike & ~self.pulling]
        if not len(pulling) or not len(others):
            return math.inf if len(pulling) else -math.inf
        middle = others.median()
        unit = (others.quantile(0.99) - middle).clamp(min=torch.finfo(others.dtype).tiny)
        return float((pulling.quantile(0.1) - middle) / unit)

    @property
    def stands_apart(self) -> bool:
        """Whether those who pull the same way are a minority that stands clearly out.

        Of a clean class a tail that pulls the same way stands out by less.
        """
        return 2 * int(self.pulling.sum()) <= int(self.alike.sum()) and self.standing_out >= _CLEARLY


@final
class _OwnLoss(Task):
    """Training gradients as queries: the loss is the measurement."""

    def __init__(self) -> None:
        self._task = ClassificationTask()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._task.loss(model, batch)

    def measurement(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._task.loss(model, batch)

    def sampled_loss(self, model: nn.Module, batch: Batch, noise: Tensor) -> Tensor:
        return self._task.sampled_loss(model, batch, noise)


def company(
    model: nn.Module,
    factors: Factors,
    training_set: TrainingSet,
    surest: Tensor,
    *,
    damping: Damping,
    batch_size: int,
    progress: Progress | None = None,
) -> Company:
    """Score every example by its cosine with Int64[k] `surest`, in the metric of the inverse curvature."""
    surest = surest[:_MOST].cpu()
    chosen = training_set.subset(surest)
    queries = precondition(
        model, factors, chosen.batch(0, len(chosen)), _OwnLoss(), damping=damping, batch_size=batch_size
    )
    found = score(
        model,
        queries,
        training_set,
        ClassificationTask(),
        self_influence=True,
        batch_size=batch_size,
        progress=progress,
    )
    assert found.self_influence is not None
    length = found.self_influence.cpu().clamp(min=0).sqrt()
    inverse = torch.where(length > 0, 1 / length, 0)
    cosines = found.values.cpu() * inverse * inverse[surest][:, None]
    among = cosines[:, surest].clone().fill_diagonal_(0)
    # Perron and Frobenius: the leading eigenvector of a non-negative matrix has one sign.
    weights = torch.linalg.eigh(((among + among.t()) / 2).clamp(min=0).double()).eigenvectors[:, -1].abs()
    if float(weights.sum()) <= 0 or len(surest) == 1:
        weights = torch.ones(len(surest), dtype=torch.float64)
    # An example is no company to itself.
    present = torch.ones(len(surest), len(training_set), dtype=torch.float64)
    present[torch.arange(len(surest)), surest] = 0
    weighted = weights[:, None] * present
    total = weighted.sum(0)
    scores = (weighted * cosines.double()).sum(0) / torch.where(total > 0, total, 1)
    labels = training_set.labels.cpu()
    counts = torch.bincount(labels[surest], minlength=training_set.num_classes)
    alike = (counts >= 0.1 * len(surest))[labels]
    return Company(scores, valley(scores[alike]), alike)


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
