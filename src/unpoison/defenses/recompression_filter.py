"""Recompression filter: drop the examples whose features change under JPEG and a shift, and noisy ones.

Ours. Comparing an input with a squeezed copy of it is from Xu, Evans and Qi, "Feature Squeezing: Detecting
Adversarial Examples in Deep Neural Networks" (NDSS 2018, arXiv 1704.01155), who do it at test time; here it
is done for the training set. The pixels of a clean-label poison were optimised until its gradient has a
chosen direction, and a change that is hardly visible undoes much of that.

I    transform  every training image once by JPEG, and once by a shift of one pixel in each direction.
II   displace   In a round, the distance between the features (the input of the last linear layer) of each
                image and of each transformed copy, in eval mode; divided by the median distance.
III  noise      The noise level of each image: the median over its pixels of the response to the mask of
                Immerkaer ("Fast Noise Variance Estimation", 1996); divided by the median level.
IV   threshold  The three are summed. Sums above `Q3 + iqr_factor (Q3 - Q1)` are dropped for the rest of the
                training; of each class at most a fraction, the highest first.

There is one round: before the first step for a network that was trained before, as in fine-tuning; from
scratch when the training accuracy is high enough. Unlike EPIC and `KNNOutlierFilter` it does not need poisons
to be isolated.

Cost: once a recompression, some seconds for 50,000 images of 32x32, and three forward passes, as much as one
epoch; one more forward pass for each round before the training accuracy is reached. Memory: one copy of the
training set, 8 bits a value, and its features.

Limits: the noise level is informative for strong perturbations (eps 16 on photographs); where they are
smooth, or all images are noisy, only the displacement is left. Poison that is neither optimised nor noisy
(patches, wrong labels) is not found. JPEG needs images of one channel or three.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Final, final

import torch
from torch import Tensor, nn

from unpoison._option_checks import Fraction, NonNegativeFloat
from unpoison._recompression import grain as grain
from unpoison._recompression import recompressed
from unpoison.data import TrainingSet
from unpoison.defenses._dropping import DroppingDefense, Drops, check_ascending
from unpoison.defenses._methods import register
from unpoison.errors import InputError
from unpoison.models import FeatureTap, last_linear, logits_of
from unpoison.training import Recipe

_BATCH: Final = 512


@final
@register(
    name="recompression-filter",
    title="Recompression filter",
    summary="Drops noisy examples, and those whose features change when they are recompressed.",
    paper="ours, after Xu, Evans and Qi, NDSS 2018, arXiv 1704.01155",
    cost="once a recompression and three forward passes",
    drops_examples=True,
)
@dataclass(frozen=True, kw_only=True)
class RecompressionFilter(DroppingDefense):
    """Drop examples whose features change under recompression or a shift, and noisy ones.

    Arguments:
        quality: of the JPEG encoder, 1 (worst) to 95.
        iqr_factor: the threshold in interquartile ranges above the upper quartile, 0 or more; at 0.5 about a
            tenth of the clean examples are dropped, too.
        max_fraction: the fraction of each class that may be dropped, in [0, 1].
        min_train_accuracy: the training accuracy below which a round drops nothing, in [0, 1].
        epochs: before which to try a round, ascending, until one drops something; None is the first epoch and
            those after a fifth and two fifths of the recipe.

    Raises:
        InputError: a value is out of its range.

    >>> RecompressionFilter.for_recipe(Recipe(epochs=40, schedule="cosine")).epochs
    (0, 8, 16)
    """

    quality: Annotated[int, "[1, 95]"] = 75
    iqr_factor: NonNegativeFloat = 0.5
    max_fraction: Fraction = 0.4
    min_train_accuracy: Fraction = 0.5
    epochs: tuple[int, ...] | None = None
    _drops: Drops = field(default_factory=Drops, init=False, repr=False, compare=False)
    _recompressed: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ascending("recompression-filter", self.epochs)

    @classmethod
    def for_recipe(cls, recipe: Recipe, **changes: Any) -> RecompressionFilter:
        """With the rounds that `train` would choose for `recipe`."""
        return cls(**{"epochs": _first_half(recipe), **changes})

    def begin(self, training_set: TrainingSet, recipe: Recipe, *, seed: int) -> TrainingSet:
        """Recompress every image; the run itself trains on the images as they are.

        Raises:
            InputError: the images have neither one channel nor three.
        """
        self._recompressed[:] = [recompressed(training_set.images, quality=self.quality)]
        return super().begin(training_set, recipe, seed=seed)

    def select(self, epoch: int, logits: Tensor, labels: Tensor) -> Tensor:
        """Not possible: this defense needs images; use `recompression_scores` and `recompression_outliers`.

        Raises:
            InputError: always.
        """
        raise InputError(
            "recompression-filter: decides by images, not by logits; in a loop of your own use grain, "
            "recompression_scores and recompression_outliers"
        )

    def _is_round(self, epoch: int, recipe: Recipe | None) -> bool:
        if any(report.epoch < epoch and report.in_all for report in self.reports):
            return False
        if self.epochs is not None:
            return epoch in self.epochs
        return epoch == 0 if recipe is None else epoch in _first_half(recipe)

    def _look(self, model: nn.Module, training_set: TrainingSet) -> Tensor:
        """Float[n 4]: displacements under JPEG and shift, noise level, correctness of the prediction."""
        if not self._recompressed:
            self._recompressed[:] = [recompressed(training_set.images, quality=self.quality)]
        compressed = self._recompressed[0].to(training_set.device)
        no_layer = "recompression-filter: the model has no linear layer, whose input would be its features"
        head = last_linear(model, otherwise=no_layer)
        starts = range(0, len(training_set), _BATCH)
        with torch.no_grad(), FeatureTap(model, head, side="input") as tap:

            def features(images: Tensor) -> tuple[Tensor, Tensor]:
                predicted = logits_of(model, images).argmax(1)
                return tap.value.flatten(1), predicted

            known, right = [], []
            for start in starts:
                images, labels = training_set.batch(start, start + _BATCH)
                seen, predicted = features(images)
                known.append(seen)
                right.append((predicted == labels).double())
            columns = torch.zeros(len(training_set), 4, dtype=torch.float64, device=training_set.device)
            columns[:, 3] = torch.cat(right)
            if self._drops.included is not None and not self._is_ready(columns, self._drops.included):
                return columns
            for start, before in zip(starts, known, strict=True):
                rows = slice(start, start + _BATCH)
                images, _ = training_set.batch(start, start + _BATCH)
                for view, other in enumerate(
                    (compressed[rows].float().div(255), images.roll((1, 1), (2, 3)))
                ):
                    moved = torch.linalg.vector_norm(features(other)[0] - before, dim=1)
                    columns[rows, view] = moved.double()
                columns[rows, 2] = grain(images)
        return columns

    def _out(
        self, epoch: int, logits: Tensor | None, labels: Tensor, included: Tensor, alive: Tensor
    ) -> Tensor:
        assert logits is not None
        out = included & ~alive
        if not self._is_ready(logits, included):
            return out
        scores = recompression_scores(logits[included, :2], logits[included, 2])
        out[included] |= recompression_outliers(
            scores, labels[included], iqr_factor=self.iqr_factor, max_fraction=self.max_fraction
        )
        return out

    def _is_ready(self, columns: Tensor, included: Tensor) -> bool:
        return float(columns[included.to(columns.device), 3].mean()) >= self.min_train_accuracy


def recompression_scores(displacements: Tensor, grains: Tensor) -> Tensor:
    """Float64[n]: the score of each example, for a loop of your own; higher is more suspicious.

    Arguments:
        displacements: Float[n v], the distance between the features of each image and of each of v
            transformed copies.
        grains: Float[n], from `grain`.

    Raises:
        InputError: the shapes do not fit, or a displacement is not finite.
    """
    if displacements.ndim != 2 or grains.shape != displacements.shape[:1]:
        raise InputError(
            f"displacements and grains: expected [n v] and [n], found {tuple(displacements.shape)} and "
            f"{tuple(grains.shape)}"
        )
    wrong = ~displacements.isfinite().all(1)
    if bool(wrong.any()):
        raise InputError(
            f"displacements: {int(wrong.sum())} of {len(wrong)} examples have features that are not finite, "
            f"the first at index {int(wrong.nonzero()[0])}; the training has diverged"
        )
    if not len(grains):
        return grains.double()
    # Plus one 8-bit step, the size of rounding, so that the median of plain images is not zero.
    columns = torch.cat([displacements.double(), grains.double()[:, None] + 1], 1)
    return (columns / columns.median(0).values.clamp_min(1e-12)).sum(1)


def recompression_outliers(
    scores: Tensor, labels: Tensor, *, iqr_factor: float = 0.5, max_fraction: float = 0.4
) -> Tensor:
    """Bool[n]: the examples whose scores are outliers above all others.

    Arguments:
        scores: Float[n], from `recompression_scores`.
        labels: Int64[n].
        iqr_factor: the threshold in interquartile ranges above the upper quartile.
        max_fraction: the fraction of each class that may be outliers, in [0, 1].

    Raises:
        InputError: the shapes do not fit.

    >>> scores = torch.tensor([1.0, 1.1, 0.9, 1.0, 1.2, 0.8, 1.0, 5.0])
    >>> recompression_outliers(scores, torch.zeros(8, dtype=torch.int64), iqr_factor=1).nonzero().tolist()
    [[7]]
    """
    if scores.shape != labels.shape or labels.ndim != 1:
        raise InputError(
            f"scores and labels: expected [n] and [n], found {tuple(scores.shape)} and {tuple(labels.shape)}"
        )
    out = torch.zeros_like(labels, dtype=torch.bool)
    if not len(scores):
        return out
    ordered = scores.double().sort().values
    last = len(ordered) - 1
    low, high = float(ordered[round(0.25 * last)]), float(ordered[round(0.75 * last)])
    beyond = scores > high + iqr_factor * (high - low)
    for label in range(int(labels.max()) + 1):
        ours = labels == label
        candidates = (ours & beyond).nonzero().squeeze(1)
        farthest = scores[candidates].argsort(descending=True, stable=True)
        out[candidates[farthest[: int(max_fraction * int(ours.sum()))]]] = True
    return out


def _first_half(recipe: Recipe) -> tuple[int, ...]:
    """The first epoch, and those after a fifth and two fifths of the training."""
    return tuple(sorted({0, round(0.2 * recipe.epochs), round(0.4 * recipe.epochs)}))
