"""Which examples look tuned, as those do that are surely to blame?

Poison whose labels are right carries its cause in its pixels: each was tuned on its own, and two of them need
not pull the model the same way (`_company` looks for that). But tuning shows. It is noise, also where the
image is flat, and what it does to the features does not outlive a recompression or a shift, as in the defense
`feature-squeezing`. What that looks like for this attack is learnt from the surest. Stages:

1. looks     of every example labelled like the surest, three numbers: how far its features move under JPEG
             and under a shift of one pixel (logarithms), and its grain, at the flattest quarter of the image;
             each less the median of its class, over the median deviation.
2. gate      the surest must be grainier than their class, or nothing here speaks of tuning: one of them is
             grainier than another example of its class at least three times in four.
3. two groups  of one covariance, in the space of the looks and of the excess (as normal scores, so that the
             surest, which were chosen by it, do not drown the rest); expectation and maximisation
             (Dempster, Laird and Rubin, 1977), in which the surest are known to belong to the first group
             (semi-supervised, as in Nigam et al., 2000).
4. score     = the logarithm of the odds of belonging to the first group; above 0 is more likely than not.

Cost: three forward passes of the examples of that label, and their recompression.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, final

import torch
from torch import Tensor, nn

from unpoison._squeezing import grain, recompressed
from unpoison.data import TrainingSet
from unpoison.detectors._detector import Progress
from unpoison.detectors._representations import Reader

_FEWEST: Final = 5  # that a group can be learnt from
_FLATTEST: Final = 0.25
_QUALITY: Final = 75
_GRAINIER: Final = 0.75
_FARTHEST: Final = 6.0  # deviations from the median; farther says nothing more
_RIDGE: Final = 0.1


@final
@dataclass(frozen=True, eq=False)
class Looks:
    """Float64[n] log odds of looking as the surest do, the lowest for those with other labels, and who does.

    `alike`, Bool[n], are the examples with a label that at least a tenth of the surest carry.
    """

    scores: Tensor
    alike: Tensor


def looks(
    model: nn.Module,
    training_set: TrainingSet,
    surest: Tensor,
    excess: Tensor,
    *,
    batch_size: int,
    progress: Progress | None = None,
) -> Looks | None:
    """Score every example by its looks; None where the surest do not look tuned.

    Arguments:
        model: that was trained on the set.
        training_set: what to look at.
        surest: Int64[k], the surest first. Where they are fewer than five, those follow that are blamed most.
        excess: Float[n], how much each is blamed.
        batch_size: images of a forward pass.
        progress: called with "features", examples done and examples to do.
    """
    labels = training_set.labels.cpu()
    counts = torch.bincount(labels[surest], minlength=training_set.num_classes)
    alike = (counts >= 0.1 * len(surest))[labels]
    rows = alike.nonzero()[:, 0]
    if len(rows) < 4 * _FEWEST:
        return None
    known = torch.zeros(len(rows), dtype=torch.bool)
    known[excess[rows].argsort(descending=True, stable=True)[: max(_FEWEST, len(surest))]] = True
    known |= torch.isin(rows, surest)
    if int(known.sum()) > len(rows) // 2:
        return None

    columns = _seen(model, training_set.subset(rows), batch_size, progress)
    groups = [(labels[rows] == label).nonzero()[:, 0] for label in torch.unique(labels[rows])]
    for group in groups:
        columns[group] = _standardised(columns[group])
    if _chance_above(columns[known, -1], columns[~known, -1]) < _GRAINIER:
        return None
    blame = torch.empty(len(rows), dtype=torch.float64)
    for group in groups:
        blame[group] = _normal_scores(excess[rows][group])
    odds = two_groups(torch.cat([blame[:, None], columns], 1), known)
    scores = odds.min() - 2 + _normal_scores(excess).mul(0.1).tanh()
    scores[rows] = odds
    return Looks(scores, alike)


def two_groups(points: Tensor, known: Tensor, *, rounds: int = 200) -> Tensor:
    """Float64[n]: the log odds of Float64[n d] `points` to belong to the group of those that are `known`.

    Both groups are normal, with one covariance; the first takes at most half of all.

    >>> points = torch.tensor([[0.0], [0.2], [-0.1], [0.1], [-0.2], [0.0], [5.0], [5.2], [4.9]])
    >>> known = torch.tensor([0, 0, 0, 0, 0, 0, 0, 0, 1], dtype=torch.bool)
    >>> (two_groups(points, known) > 0).tolist()
    [False, False, False, False, False, False, True, True, True]
    """
    points = points.double()
    count, width = points.shape
    belonging, odds = known.double(), known.double()
    for _ in range(rounds):
        first, second = belonging.sum(), (1 - belonging).sum()
        to_first = points - (belonging @ points) / first
        to_second = points - ((1 - belonging) @ points) / second
        scatter = (belonging[:, None] * to_first).t() @ to_first
        scatter = scatter + ((1 - belonging)[:, None] * to_second).t() @ to_second
        # The ridge keeps a direction in which all are alike from deciding.
        inverse = torch.linalg.inv(scatter / count + _RIDGE * torch.eye(width, dtype=torch.float64))
        share = (first / count).clamp(max=0.5)
        nearer = ((to_second @ inverse) * to_second).sum(1) - ((to_first @ inverse) * to_first).sum(1)
        odds = nearer / 2 + torch.log(share / (1 - share))
        updated = torch.where(known, 1.0, odds.sigmoid())
        settled = float((updated - belonging).abs().max()) < 1e-6
        belonging = updated
        if settled:
            break
    return odds


def _seen(model: nn.Module, examples: TrainingSet, batch_size: int, progress: Progress | None) -> Tensor:
    """Float64[n 3]: the displacements under JPEG and shift, and the grain; grain alone without colours."""
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


def _chance_above(first: Tensor, second: Tensor) -> float:
    """How often one of the first is above one of the second; a tie counts half."""
    ordered = second.sort().values
    below = torch.searchsorted(ordered, first)
    upto = torch.searchsorted(ordered, first, right=True)
    return float((below + upto).double().mean() / 2 / max(len(second), 1))
