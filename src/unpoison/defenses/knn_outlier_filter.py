"""kNN outlier filter: drop the few examples that lie far from their class in gradient space.

Ours, after EPIC (Yang, Liu and Mirzasoleiman, ICML 2022). It costs less, finds groups of similar poisons, and
bounds how much is dropped. Stages of a round, in each class:

I    merge      Gradients that differ by a few hundredths of their length count as one, so that copies of a
                poison are not each other's neighbours. Groups too large to be outliers are exempt.
II   distance   of each gradient to its m-th nearest neighbour, so that groups of up to m are outliers
                together. No matrix of distances is kept.
III  threshold  Distances above `Q3 + iqr_factor (Q3 - Q1)` of the class, and above a minimum, are outliers.
IV   cap        The farthest of these are dropped, up to a fraction of the class that grows from round to
                round. A class of ten loses at most one example.

There is no round while the training accuracy is low, since gradients then carry no information.

Cost of a round at 50,000 examples of 10 classes: a forward pass and well under a second; all rounds together
take less than a twentieth of the training. Memory: a few times that of the gradients, and blocks of 8 MB
where no tree is used.

Limits: the cap decides how much is dropped, so where poisons are many, or close to their class, most of them
stay; so do groups of more than m poisons with different gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Final, final

import torch
from torch import Tensor

from unpoison._option_checks import Fraction, NonNegativeFloat, PositiveInt
from unpoison.defenses._dropping import DroppingDefense, Drops, check_ascending
from unpoison.defenses._gradients import check_logits, logit_gradients
from unpoison.defenses._methods import register
from unpoison.training import Recipe

_BLOCK_BYTES: Final = 2**23
# In more dimensions a tree is slower than all pairs.
_TREE_DIMENSIONS: Final = 32
# A forward pass costs about a third of an epoch: with so many rounds an epoch they stay below a twentieth.
_ROUNDS_AN_EPOCH: Final = 0.12
_MOST_ROUNDS: Final = 5


@final
@register(
    name="knn-outlier-filter",
    title="kNN outlier filter",
    summary="In a few rounds drops the few examples that lie far from their class in gradient space.",
    paper="ours, after EPIC",
    cost="a round: one forward pass and under a second of neighbour search",
    drops_examples=True,
)
@dataclass(frozen=True, kw_only=True)
class KNNOutlierFilter(DroppingDefense):
    """Drop the outliers of each class, within a cap.

    Arguments:
        max_fraction: the fraction of each class that all rounds together may drop, in [0, 1]; the cap grows
            by equal steps from round to round.
        neighbours: m, 1 or more: groups of up to m examples can be outliers.
        merge: gradients within about this fraction of their length count as one; 0 merges equal ones only.
        iqr_factor: the threshold in interquartile ranges above the upper quartile of a class, 0 or more.
        min_distance: no example below this distance is dropped; gradients are at most 1.41 long.
        min_train_accuracy: the training accuracy below which a round drops nothing, in [0, 1].
        epochs: those with a round, ascending; None spreads a few over the middle half of the recipe's epochs.

    Raises:
        InputError: a value is out of its range.

    >>> KNNOutlierFilter.for_recipe(Recipe(epochs=40, schedule="cosine")).epochs
    (12, 18, 22, 28)
    """

    max_fraction: Fraction = 0.1
    neighbours: PositiveInt = 8
    merge: Fraction = 0.05
    iqr_factor: NonNegativeFloat = 1.5
    min_distance: Annotated[float, "[0, 2]"] = 0.05
    min_train_accuracy: Fraction = 0.5
    epochs: tuple[int, ...] | None = None
    _drops: Drops = field(default_factory=Drops, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ascending("knn-outlier-filter", self.epochs)

    @classmethod
    def for_recipe(cls, recipe: Recipe, **changes: Any) -> KNNOutlierFilter:
        """With the rounds that `train` would choose for `recipe`, for a loop of your own."""
        return cls(**{"epochs": _spread(recipe), **changes})

    def _rounds(self, recipe: Recipe | None) -> tuple[int, ...]:
        if self.epochs is not None:
            return self.epochs
        return () if recipe is None else _spread(recipe)

    def _is_round(self, epoch: int, recipe: Recipe | None) -> bool:
        return epoch in self._rounds(recipe)

    def _out(
        self, epoch: int, logits: Tensor | None, labels: Tensor, included: Tensor, alive: Tensor
    ) -> Tensor:
        assert logits is not None
        check_logits(logits, labels)
        out = included & ~alive
        if float((logits.argmax(1) == labels)[included].double().mean()) < self.min_train_accuracy:
            return out
        rounds = self._rounds(self._drops.recipe)
        due = sum(number <= epoch for number in rounds) / len(rounds) if rounds else 1.0
        return self._outliers(logits, labels, included, out, self.max_fraction * due)

    def _outliers(
        self, logits: Tensor, labels: Tensor, included: Tensor, out: Tensor, max_fraction: float
    ) -> Tensor:
        """`out` and the outliers besides, up to a fraction of each class."""
        scores = distances(logits, labels, neighbours=self.neighbours, merge=self.merge, among=included)
        result = out.clone()
        quarters = torch.tensor([0.25, 0.75], dtype=torch.float64, device=scores.device)
        for label in range(logits.shape[1]):
            ours = included & (labels == label)
            room = int(max_fraction * int(ours.sum())) - int((out & ours).sum())
            if room <= 0:
                continue
            low, high = torch.quantile(scores[ours], quarters).tolist()
            limit = max(self.min_distance, high + self.iqr_factor * (high - low))
            candidates = (ours & ~out & (scores > limit)).nonzero().squeeze(1)
            farthest = scores[candidates].argsort(descending=True, stable=True)[:room]
            result[candidates[farthest]] = True
        return result


def outliers(logits: Tensor, labels: Tensor, *, among: Tensor | None = None, **options: Any) -> Tensor:
    """Bool[n]: the examples that lie far from their class in gradient space.

    Arguments:
        logits: Float[n classes], of all examples, in eval mode and without augmentation; on any device.
        labels: Int64[n], as trained on.
        among: Bool[n], the examples to consider; None is all. The others are not outliers.
        options: as of `KNNOutlierFilter`: max_fraction, neighbours, merge, iqr_factor, min_distance.

    Raises:
        InputError: the shapes do not fit, logits are not finite, or a value is out of its range.

    >>> logits = torch.tensor([[9.0, 0.0]] * 40 + [[0.0, 9.0]] * 2)
    >>> outliers(logits, torch.zeros(42, dtype=torch.int64)).nonzero().flatten().tolist()
    [40, 41]
    """
    settings = KNNOutlierFilter(**options)
    among = torch.ones_like(labels, dtype=torch.bool) if among is None else among
    nothing = torch.zeros_like(among)
    return settings._outliers(logits, labels, among, nothing, settings.max_fraction)


def distances(logits: Tensor, labels: Tensor, *, neighbours: int, merge: float, among: Tensor) -> Tensor:
    """Float64[n]: the distance of each gradient to its m-th nearest neighbour in its class, copies aside.

    0 where there is no neighbour, for examples that are not in `among`, and for groups of merged gradients
    too large to be outliers: more than m, and more than a hundredth of the class.
    """
    gradients = logit_gradients(logits, labels)
    scores = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
    for label in range(logits.shape[1]):
        members = ((labels == label) & among).nonzero().squeeze(1)
        if len(members) > 1:
            centres, group, weights = _merged(gradients[members], merge)
            far = _kth_distance(centres, neighbours)
            far[weights > max(neighbours, 0.01 * len(members))] = 0.0
            scores[members] = far[group]
    return scores


def _merged(points: Tensor, merge: float) -> tuple[Tensor, Tensor, Tensor]:
    """The mean of each group of near-equal points, the group of each point, and the groups' sizes.

    Points are grouped that round to the same point of a grid, whose spacing is a fraction of their length
    rounded to a power of two. So no search is needed, and chains of neighbours do not join distant points.
    """
    if merge:
        length = points.norm(dim=1, keepdim=True).clamp_min(1e-30)
        octave = length.log2().floor()
        keys = torch.cat([(points / (merge * octave.exp2())).round(), octave], 1)
    else:
        keys = points
    values, group, weights = torch.unique(keys + 0.0, dim=0, return_inverse=True, return_counts=True)
    sums = torch.zeros(len(values), points.shape[1], dtype=points.dtype, device=points.device)
    return sums.index_add_(0, group, points) / weights[:, None], group, weights


def _kth_distance(points: Tensor, k: int) -> Tensor:
    """Float64[n]: the distance of each point to its k-th nearest neighbour, or to the farthest."""
    n = len(points)
    k = min(k, n - 1)
    if not k:
        return torch.zeros(n, dtype=torch.float64, device=points.device)
    if points.device.type == "cpu" and points.shape[1] <= _TREE_DIMENSIONS:
        from sklearn.neighbors import KDTree

        near, _ = KDTree(points.numpy(), leaf_size=20).query(points.numpy(), k=k + 1)
        return torch.from_numpy(near[:, k].copy())
    return _kth_distance_in_blocks(points, k)


def _kth_distance_in_blocks(points: Tensor, k: int) -> Tensor:
    """The same from all pairs, on any device, in any dimension."""
    n = len(points)
    squares = points.square().sum(1, keepdim=True)
    ones = torch.ones_like(squares)
    left, right = torch.cat([-2 * points, squares, ones], 1), torch.cat([points, ones, squares], 1).T
    found = []
    for block in torch.split(left, max(1, _BLOCK_BYTES // (8 * n))):
        squared = (block @ right).float()
        found.append(squared.kthvalue(k + 1, dim=1).values)
    return torch.cat(found).clamp_min(0).sqrt().double()


def _spread(recipe: Recipe) -> tuple[int, ...]:
    """A few epochs in the middle half of the training."""
    count = max(1, min(_MOST_ROUNDS, int(_ROUNDS_AN_EPOCH * recipe.epochs)))
    places = (0.25 + 0.5 * (index + 0.5) / count for index in range(count))
    return tuple(sorted({round(place * recipe.epochs) for place in places}))
