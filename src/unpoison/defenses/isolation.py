"""Isolation: drop the few examples that lie far from their class in gradient space, alone or in small groups.

Ours, after EPIC (Yang, Liu and Mirzasoleiman, ICML 2022), from which it differs where EPIC is dear, or blind,
or reckless. Stages of a round, in each class:

I    merge      Gradients that differ by no more than a few hundredths of their length count once, however
                many they are: copies of a poison are no company. Groups too large to be strays are spared.
II   distance   of each to its m-th nearest neighbour, so that groups of up to m are as far out as their
                nearest stranger; no matrix is kept.
III  stand out  Only what lies beyond the fence of the class's own distances, `Q3 + fence (Q3 - Q1)`, and
                beyond a distance that means something for the training, may go.
IV   cap        Of those the farthest, up to a share of the class that grows from round to round. The share
                bounds what a small training set can lose, and a class of ten loses at most one example.

There is no round while the network answers most of the set wrongly: gradients then tell nothing.

Cost of a round at 50,000 examples of 10 classes: a forward pass and well under a second; the rounds are so
few that together they take less than a twentieth of the training. Memory: a few times that of the gradients;
blocks of 8 MB where no tree is used.

Limits: the cap decides how much goes, so where poisons are many, or stay near their class, most of them stay;
groups of more than m poisons whose gradients differ are company for each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, final

import torch
from torch import Tensor

from unpoison.defenses._dropping import DroppingDefense, Drops
from unpoison.defenses._gradients import check_logits, logit_gradients
from unpoison.defenses._methods import register
from unpoison.errors import InputError
from unpoison.training import Recipe

_BLOCK_BYTES: Final = 2**23
# Beyond it a tree is slower than all pairs.
_TREE_DIMENSIONS: Final = 32
# A forward pass costs about a third of an epoch: with so many rounds an epoch they stay below a twentieth.
_ROUNDS_AN_EPOCH: Final = 0.12
_MOST_ROUNDS: Final = 5


@final
@register(
    name="isolation",
    title="Isolation",
    summary="In a few rounds drops the few examples that lie far from their class in gradient space.",
    paper="ours, after EPIC",
    cost="a round: one forward pass and under a second of neighbour search",
    drops_examples=True,
)
@dataclass(frozen=True, kw_only=True)
class Isolation(DroppingDefense):
    """Drop what lies far from its class, within a cap.

    Arguments:
        most: the share of each class that all rounds together may drop, in [0, 1]; the cap grows by equal
            steps from round to round.
        neighbours: m, 1 or more: groups of up to m examples can be isolated.
        merge: gradients within about this share of their length are the same; 0 merges equal ones only.
        fence: how many interquartile ranges above the upper quartile of its class a distance stands out, 0 or
            more.
        least: the distance below which nothing is dropped; gradients are at most 1.41 long.
        ready: the share of examples that must be answered as labelled before a round drops anything.
        epochs: those with a round, ascending; None spreads a few over the middle half of the recipe's epochs.

    Raises:
        InputError: a value is out of its range.

    >>> Isolation.for_recipe(Recipe(epochs=40, schedule="cosine")).epochs
    (12, 18, 22, 28)
    """

    most: float = 0.1
    neighbours: int = 8
    merge: float = 0.05
    fence: float = 1.5
    least: float = 0.05
    ready: float = 0.5
    epochs: tuple[int, ...] | None = None
    _drops: Drops = field(default_factory=Drops, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check(self.most, self.neighbours, self.merge, self.fence, self.least)
        _check_number("ready", self.ready, 1.0)
        if self.epochs is not None:
            epochs = tuple(self.epochs)
            whole = all(isinstance(epoch, int) and not isinstance(epoch, bool) for epoch in epochs)
            if not epochs or not whole or list(epochs) != sorted(set(epochs)) or epochs[0] < 0:
                raise InputError(f"isolation: epochs must be ascending whole numbers, found {self.epochs!r}")
            object.__setattr__(self, "epochs", epochs)

    @classmethod
    def for_recipe(cls, recipe: Recipe, **changes: Any) -> Isolation:
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
        out = included & ~alive
        check_logits(logits, labels)
        if float((logits.argmax(1) == labels)[included].double().mean()) < self.ready:
            return out
        scores = distances(logits, labels, neighbours=self.neighbours, merge=self.merge, among=included)
        rounds = self._rounds(self._drops.recipe)
        due = sum(number <= epoch for number in rounds) / len(rounds) if rounds else 1.0
        return _beyond(
            scores, labels, logits.shape[1], included, out, self.fence, self.least, self.most * due
        )


def strays(
    logits: Tensor,
    labels: Tensor,
    *,
    most: float = 0.1,
    neighbours: int = 8,
    merge: float = 0.05,
    fence: float = 1.5,
    least: float = 0.05,
    among: Tensor | None = None,
) -> Tensor:
    """Bool[n]: the examples that lie far from their class in gradient space, at most `most` of each class.

    Arguments:
        logits: Float[n classes], of all examples, in eval mode and without augmentation; on any device.
        labels: Int64[n], as trained on.
        most: the share of each class that may be named, in [0, 1].
        neighbours: m, 1 or more: groups of up to m examples can be strays.
        merge: gradients within about this share of their length are the same; 0 merges equal ones only.
        fence: how many interquartile ranges above the upper quartile of its class a distance stands out.
        least: the distance below which nothing is a stray.
        among: Bool[n], the examples to look at; None is all. The others are no strays.

    Raises:
        InputError: the shapes do not fit, logits are not finite, or a value is out of its range.

    >>> logits = torch.tensor([[9.0, 0.0]] * 40 + [[0.0, 9.0]] * 2)
    >>> strays(logits, torch.zeros(42, dtype=torch.int64)).nonzero().flatten().tolist()
    [40, 41]
    """
    _check(most, neighbours, merge, fence, least)
    among = torch.ones_like(labels, dtype=torch.bool) if among is None else among
    scores = distances(logits, labels, neighbours=neighbours, merge=merge, among=among)
    return _beyond(scores, labels, logits.shape[1], among, torch.zeros_like(among), fence, least, most)


def distances(logits: Tensor, labels: Tensor, *, neighbours: int, merge: float, among: Tensor) -> Tensor:
    """Float64[n]: how far each example lies from the m-th nearest of its class that is no copy of it.

    0 where there is no such other, for examples not `among` those looked at, and for members of groups of
    equals that are too large to be strays: more than m, and more than a hundredth of the class.
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

    Equal are those that round to the same point of a grid whose mesh is a share of their length, to a power
    of two: no search, and no chains of neighbours that join what lies far apart.
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
    """Float64[n]: the distance of each point to its k-th nearest other, to the farthest of fewer."""
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
    """The same from all pairs, on any device and in any dimension."""
    n = len(points)
    squares = points.square().sum(1, keepdim=True)
    ones = torch.ones_like(squares)
    left, right = torch.cat([-2 * points, squares, ones], 1), torch.cat([points, ones, squares], 1).T
    found = []
    for block in torch.split(left, max(1, _BLOCK_BYTES // (8 * n))):
        squared = (block @ right).float()
        found.append(squared.kthvalue(k + 1, dim=1).values)
    return torch.cat(found).clamp_min(0).sqrt().double()


def _beyond(
    scores: Tensor,
    labels: Tensor,
    classes: int,
    included: Tensor,
    out: Tensor,
    fence: float,
    least: float,
    most: float,
) -> Tensor:
    """`out` and what stands out besides, up to a share of each class."""
    result = out.clone()
    quarters = torch.tensor([0.25, 0.75], dtype=torch.float64, device=scores.device)
    for label in range(classes):
        ours = included & (labels == label)
        size = int(ours.sum())
        room = int(most * size) - int((out & ours).sum())
        if room <= 0:
            continue
        low, high = torch.quantile(scores[ours], quarters).tolist()
        limit = max(least, high + fence * (high - low))
        candidates = (ours & ~out & (scores > limit)).nonzero().squeeze(1)
        farthest = scores[candidates].argsort(descending=True, stable=True)[:room]
        result[candidates[farthest]] = True
    return result


def _spread(recipe: Recipe) -> tuple[int, ...]:
    """A few epochs in the middle half of the training."""
    count = max(1, min(_MOST_ROUNDS, int(_ROUNDS_AN_EPOCH * recipe.epochs)))
    places = (0.25 + 0.5 * (index + 0.5) / count for index in range(count))
    return tuple(sorted({round(place * recipe.epochs) for place in places}))


def _check(most: float, neighbours: int, merge: float, fence: float, least: float) -> None:
    _check_number("most", most, 1.0)
    _check_number("merge", merge, 1.0)
    _check_number("fence", fence, 1e6)
    _check_number("least", least, 2.0)
    if isinstance(neighbours, bool) or not isinstance(neighbours, int) or neighbours < 1:
        raise InputError(f"isolation: neighbours must be a whole number, 1 or more, found {neighbours!r}")


def _check_number(name: str, value: float, greatest: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= greatest:
        raise InputError(f"isolation: {name} must be a number in 0..{greatest:g}, found {value!r}")
