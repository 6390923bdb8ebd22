"""Which examples look tuned, as those do that are surely to blame?

Poison whose labels are right carries its cause in its pixels: each was tuned on its own, and two of them need
not pull the model the same way (`_company` looks for that). But tuning shows. It is noise, also where the
image is flat, and what it does to the features does not outlive a recompression or a shift, as in the defense
`feature-squeezing`. What that looks like for this attack is learnt from the surest. Stages:

1. looks     of every example labelled like the surest one number: its grain at the flattest quarter of the
             image, and half of each of how far its features move under JPEG and under a shift of one pixel;
             all three as logarithms, less the median of the class, over the median deviation.
2. two groups  of one covariance, in the plane of the looks and of the excess (as normal scores, so that the
             surest, which were chosen by it, do not drown the rest); expectation and maximisation
             (Dempster, Laird and Rubin, 1977), in which the surest are known to belong to the first group
             (semi-supervised, as in Nigam et al., 2000). It starts once from the surest alone and once from
             the groups by looks alone; the likelier end counts.
3. gate      the first group must look more tuned by two deviations, the distance at which groups part cleanly
             (Ashman, Bird and Zepf, 1994), and three in five of the surest must belong to it by themselves;
             else nothing here speaks of tuning.
4. score     = the logarithm of the odds of belonging to the first group; above 0 is more likely than not.

Cost: three forward passes of the examples of that label, and their recompression.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final, final

import torch
from torch import Tensor, nn

from unpoison._progress import Progress
from unpoison._squeezing import grain, recompressed
from unpoison.data import TrainingSet
from unpoison.detectors._representations import Reader

_FEWEST: Final = 5  # that a group can be learnt from
_FLATTEST: Final = 0.25
_QUALITY: Final = 75
_CLEANLY: Final = 2.0
_MOST: Final = 0.6
_FARTHEST: Final = 6.0  # deviations from the median; farther says nothing more
_RIDGE: Final = 0.1


def looks(
    model: nn.Module,
    training_set: TrainingSet,
    surest: Tensor,
    alike: Tensor,
    excess: Tensor,
    *,
    batch_size: int,
    progress: Progress | None = None,
) -> Tensor | None:
    """Float64[n]: the log odds of looking as the surest do; None where the surest do not look tuned.

    Who is not alike comes after all who are, in the order of the excess.

    Arguments:
        model: that was trained on the set.
        training_set: what to look at.
        surest: Int64[k], the surest first. Where they are fewer than five, those follow that are blamed most.
        alike: Bool[n], the examples that are looked at, those labelled like the surest.
        excess: Float[n], how much each is blamed.
        batch_size: images of a forward pass.
        progress: called with "features", examples done and examples to do.
    """
    rows = alike.nonzero()[:, 0]
    labels = training_set.labels.cpu()[rows]
    if len(rows) < 4 * _FEWEST:
        return None
    known = torch.zeros(len(rows), dtype=torch.bool)
    known[excess[rows].argsort(descending=True, stable=True)[: max(_FEWEST, len(surest))]] = True
    known |= torch.isin(rows, surest)
    if int(known.sum()) > len(rows) // 2:
        return None

    tuned, blame = _tuned(model, training_set.subset(rows), batch_size, progress), excess[rows].double()
    for label in torch.unique(labels):
        group = labels == label
        tuned[group] = _standardised(tuned[group])
        blame[group] = _normal_scores(blame[group])
    # Grain, and half of each of the two displacements, which tell nearly the same.
    look = tuned @ torch.tensor([*[0.5] * (tuned.shape[1] - 1), 1.0], dtype=torch.float64)
    by_looks = two_groups(look[:, None], known, known.double())
    starts = (known.double(), by_looks.odds.sigmoid().where(~known, 1.0))
    both = [two_groups(torch.stack([look, blame], 1), known, start) for start in starts]
    groups = max(both, key=lambda found: found.likelihood)
    members = (groups.odds[known] > 0).double().mean()
    if not (float(groups.distance[0]) > _CLEANLY and float(members) >= _MOST):
        return None
    scores = groups.odds.min() - 2 + _normal_scores(excess).mul(0.1).tanh()
    scores[rows] = groups.odds
    return scores


@final
@dataclass(frozen=True, eq=False)
class Groups:
    """Two groups of points.

    Arguments:
        odds: Float64[n], the logarithm of the odds of each to be of the first group.
        likelihood: the logarithm of that of all points.
        distance: Float64[d], how far the first group's mean lies above the second's, in deviations.
    """

    odds: Tensor
    likelihood: float
    distance: Tensor


def two_groups(points: Tensor, known: Tensor, start: Tensor, *, rounds: int = 300) -> Groups:
    """How likely each of Float[n d] `points` belongs to the group of those that are `known`.

    Both groups are normal, with one covariance; the first takes at most half of all.

    Arguments:
        points: where they lie.
        known: Bool[n], who is of the first group for certain.
        start: Float64[n], the probabilities to begin with.
        rounds: of expectation and maximisation, at most.

    >>> points = torch.tensor([[0.0], [0.2], [-0.1], [0.1], [-0.2], [0.0], [5.0], [5.2], [4.9]])
    >>> known = torch.tensor([0, 0, 0, 0, 0, 0, 0, 0, 1], dtype=torch.bool)
    >>> (two_groups(points, known, known.double()).odds > 0).tolist()
    [False, False, False, False, False, False, True, True, True]
    """
    points, belonging = points.double(), start.double()
    count, width = points.shape
    # The ridge keeps a direction in which all are alike from deciding.
    ridge = _RIDGE * torch.eye(width, dtype=torch.float64)
    groups = Groups(belonging, -math.inf, torch.zeros(width, dtype=torch.float64))
    for _ in range(rounds):
        weights = torch.stack([belonging, 1 - belonging])
        means = weights @ points / weights.sum(1, keepdim=True)
        away = points - means[:, None]
        scatter = torch.einsum("gn,gni,gnj->ij", weights, away, away)
        covariance = scatter / count + ridge
        inner = torch.einsum("gni,ij,gnj->gn", away, torch.linalg.inv(covariance), away)
        share = (belonging.sum() / count).clamp(max=0.5)
        first, second = torch.stack([share, 1 - share]).log()[:, None] - inner / 2
        each = torch.where(known, first, torch.logaddexp(first, second)) - torch.logdet(covariance) / 2
        distance = (means[0] - means[1]) / covariance.diagonal().sqrt()
        groups = Groups(first - second, float(each.sum()), distance)
        updated = groups.odds.sigmoid().where(~known, 1.0)
        settled = float((updated - belonging).abs().max()) < 1e-6
        belonging = updated
        if settled:
            break
    return groups


def _tuned(model: nn.Module, examples: TrainingSet, batch_size: int, progress: Progress | None) -> Tensor:
    """Float64[n 3]: the displacements under JPEG (if there are 1 or 3 channels) and shift, and the grain."""
    images = examples.images
    views = [images.roll((1, 1), (2, 3))]
    if images.shape[1] in (1, 3):
        views.insert(0, recompressed(images, quality=_QUALITY))
    before = Reader(model, examples, module=None, batch_size=batch_size, progress=progress)
    readers = [
        Reader(model, replace(examples, images=view), module=before.module, batch_size=batch_size)
        for view in views
    ]
    columns = [torch.zeros(len(examples), dtype=torch.float64) for _ in readers]
    both = zip(before.in_order(), *(reader.in_order() for reader in readers), strict=True)
    for (start, seen), *others in both:
        for column, (_, moved) in zip(columns, others, strict=True):
            distances = torch.linalg.vector_norm((moved - seen).flatten(1), dim=1)
            column[start : start + len(seen)] = distances.double().cpu()
    grains = torch.cat(
        [grain(part.float() / 255, quantile=_FLATTEST).cpu() for part in torch.split(images, batch_size)]
    )
    # A grain of one 8-bit step is rounding.
    return torch.stack([*(column.clamp(min=1e-6).log() for column in columns), (grains + 1).log()], 1)


def _standardised(columns: Tensor) -> Tensor:
    """Less the median, over the median deviation, or a fifth of the deviation where most are equal."""
    centred = columns - columns.median(0).values
    unit = torch.maximum(1.4826 * centred.abs().median(0).values, 0.2 * columns.std(0, correction=0))
    return (centred / unit.clamp(min=1e-9)).clamp(-_FARTHEST, _FARTHEST)


def _normal_scores(values: Tensor) -> Tensor:
    """Float64[n]: what the ranks of Float[n] would be, were they drawn from a normal distribution."""
    ranks = values.argsort(stable=True).argsort().double()
    scores: Tensor = torch.special.ndtri((ranks + 0.5) / len(values))
    return scores
