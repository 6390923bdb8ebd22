"""Feature squeezing: drop the examples that are not what they seem once they are looked at a little askew.

Ours, after Xu, Evans and Qi, "Feature Squeezing: Detecting Adversarial Examples in Deep Neural Networks"
(NDSS 2018, arXiv 1704.01155), which compares the answers to an input and to squeezed copies of it at test
time. A clean-label poison is an adversarial example of a kind: its pixels were tuned until its gradient,
which is made of its features, points where the adversary wants, and the tuning does not outlive a change that
no eye sees. So this looks at the training set itself:

I    squeeze    every training image once by JPEG, and once by a shift of one pixel in each direction.
II   displace   In a round, for each example the distance between the features (what the last linear layer is
                given) of the image and of each squeezed copy, in eval mode; each over the median distance.
III  grain      The noise of the image itself: the median over its pixels of what the Laplacian mask of
                Immerkaer ("Fast Noise Variance Estimation", 1996) gives, the median in place of his mean, so
                that edges do not count; likewise over the median.
IV   stand out  The three are summed, and what lies beyond the fence of all sums, `Q3 + fence (Q3 - Q1)`, is
                out for the rest of the training; of each class at most a given share, the farthest first.

There is one round: before the first step for a network that was trained before, as in fine-tuning, so that
what is dropped never acts; from scratch as soon as the network answers most of the set as labelled, before
that it is not asked. Unlike EPIC, and `Isolation`, it does not need poisons to be lonely: it finds
them where they crowd in the midst of their class.

Cost: once a recompression, some seconds for 50,000 images of 32x32, and three forward passes, as much as one
epoch; one forward pass more each time that the network is not ready. Memory: one copy of the training set,
8 bits a value, and its features.

Limits: grain tells most about poisons with a loud perturbation (eps 16 on photographs); where it is smooth,
or all images are noisy, only the displacement is left. Poison that is not tuned to a network and not noisy
(patches, wrong labels) stays where it is. JPEG knows grey and colour only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from unpoison._squeezing import grain as grain
from unpoison._squeezing import recompressed
from unpoison.data import TrainingSet
from unpoison.defenses._dropping import DroppingDefense, Drops
from unpoison.defenses._methods import register
from unpoison.defenses.jpeg import JPEG
from unpoison.errors import InputError
from unpoison.models import FeatureTap
from unpoison.training import Recipe

_BATCH: Final = 512


@final
@register(
    name="feature-squeezing",
    title="Feature squeezing",
    summary="Drops examples that are grainy, and whose features move when they are recompressed.",
    paper="ours, after Xu, Evans and Qi, NDSS 2018, arXiv 1704.01155",
    cost="once a recompression and three forward passes",
    drops_examples=True,
)
@dataclass(frozen=True, kw_only=True)
class FeatureSqueezing(DroppingDefense):
    """Drop what does not look the same to the network once it is recompressed or shifted, and what is grainy.

    Arguments:
        quality: of the JPEG encoder, 1 (worst) to 95.
        fence: how many interquartile ranges above the upper quartile of all sums an example stands out, 0 or
            more; at 0.5 about a tenth of the clean examples go too.
        most: the share of each class that may be out, in [0, 1].
        ready: the share of examples that must be answered as labelled before the round takes place.
        epochs: when to ask whether the network is ready, ascending, until it is; None is the first epoch and
            those after a fifth and two fifths of the recipe.

    Raises:
        InputError: a value is out of its range.

    >>> FeatureSqueezing.for_recipe(Recipe(epochs=40, schedule="cosine")).epochs
    (0, 8, 16)
    """

    quality: int = 75
    fence: float = 0.5
    most: float = 0.4
    ready: float = 0.5
    epochs: tuple[int, ...] | None = None
    _drops: Drops = field(default_factory=Drops, init=False, repr=False, compare=False)
    _squeezed: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        JPEG(quality=self.quality)
        for name, value, greatest in (
            ("fence", self.fence, 1e6),
            ("most", self.most, 1.0),
            ("ready", self.ready, 1.0),
        ):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= greatest:
                raise InputError(
                    f"feature-squeezing: {name} must be a number in 0..{greatest:g}, found {value!r}"
                )
        if self.epochs is not None:
            epochs = tuple(self.epochs)
            whole = all(isinstance(epoch, int) and not isinstance(epoch, bool) for epoch in epochs)
            if not epochs or not whole or list(epochs) != sorted(set(epochs)) or epochs[0] < 0:
                raise InputError(
                    f"feature-squeezing: epochs must be ascending whole numbers, found {self.epochs!r}"
                )
            object.__setattr__(self, "epochs", epochs)

    @classmethod
    def for_recipe(cls, recipe: Recipe, **changes: Any) -> FeatureSqueezing:
        """With the rounds that `train` would choose for `recipe`."""
        return cls(**{"epochs": _first_half(recipe), **changes})

    def begin(self, training_set: TrainingSet, recipe: Recipe, *, seed: int) -> TrainingSet:
        """Squeeze every image; the run itself is given the images as they are.

        Raises:
            InputError: the images have neither one channel nor three.
        """
        self._squeezed[:] = [recompressed(training_set.images, quality=self.quality)]
        return super().begin(training_set, recipe, seed=seed)

    def select(self, epoch: int, logits: Tensor, labels: Tensor) -> Tensor:
        """Not from logits: this defense looks at images; use `grain`, `suspicion` and `fragile`.

        Raises:
            InputError: always.
        """
        raise InputError(
            "feature-squeezing: decides by images, not by logits; in a loop of your own use grain, suspicion "
            "and fragile"
        )

    def _is_round(self, epoch: int, recipe: Recipe | None) -> bool:
        past = zip(self._drops.epochs, self._drops.dropped, strict=True)
        if any(number < epoch and bool(dropped.any()) for number, dropped in past):
            return False
        if self.epochs is not None:
            return epoch in self.epochs
        return epoch == 0 if recipe is None else epoch in _first_half(recipe)

    def _look(self, model: nn.Module, training_set: TrainingSet) -> Tensor:
        """Float[n 4]: the displacements under JPEG and shift, the grain, and whether the answer is right."""
        if not self._squeezed:
            self._squeezed[:] = [recompressed(training_set.images, quality=self.quality)]
        squeezed = self._squeezed[0].to(training_set.device)
        head = _last_linear(model)
        starts = range(0, len(training_set), _BATCH)
        with torch.no_grad(), FeatureTap(model, head, side="input") as tap:

            def features(images: Tensor) -> tuple[Tensor, Tensor]:
                answers = model(images).argmax(1)
                return tap.value.flatten(1), answers

            known, right = [], []
            for start in starts:
                images, labels = training_set.batch(start, start + _BATCH)
                seen, answers = features(images)
                known.append(seen)
                right.append((answers == labels).double())
            columns = torch.zeros(len(training_set), 4, dtype=torch.float64, device=training_set.device)
            columns[:, 3] = torch.cat(right)
            # Only the examples of the run have a say.
            if self._drops.included is not None and not self._is_ready(columns, self._drops.included):
                return columns
            for start, before in zip(starts, known, strict=True):
                rows = slice(start, start + _BATCH)
                images, _ = training_set.batch(start, start + _BATCH)
                for view, other in enumerate((squeezed[rows].float().div(255), images.roll((1, 1), (2, 3)))):
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
        sums = suspicion(logits[included, :2], logits[included, 2])
        named = fragile(sums, labels[included], fence=self.fence, most=self.most)
        out[included] |= named
        return out

    def _is_ready(self, columns: Tensor, included: Tensor) -> bool:
        return float(columns[included.to(columns.device), 3].mean()) >= self.ready


def suspicion(displacements: Tensor, grains: Tensor) -> Tensor:
    """Float64[n]: what stands out in `fragile`, for a loop of your own.

    Arguments:
        displacements: Float[n v], how far the features of each example move under each of v squeezings.
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
    # A grain of one 8-bit step is rounding; without it images of one colour would be compared with nothing.
    columns = torch.cat([displacements.double(), grains.double()[:, None] + 1], 1)
    return (columns / columns.median(0).values.clamp_min(1e-12)).sum(1)


def fragile(sums: Tensor, labels: Tensor, *, fence: float = 0.5, most: float = 0.4) -> Tensor:
    """Bool[n]: the examples that stand out above all others.

    Arguments:
        sums: Float[n], from `suspicion`.
        labels: Int64[n].
        fence: how many interquartile ranges above the upper quartile an example stands out.
        most: the share of each class that may be named, in [0, 1].

    Raises:
        InputError: the shapes do not fit.

    >>> sums = torch.tensor([1.0, 1.1, 0.9, 1.0, 1.2, 0.8, 1.0, 5.0])
    >>> fragile(sums, torch.zeros(8, dtype=torch.int64), fence=1).nonzero().flatten().tolist()
    [7]
    """
    if sums.shape != labels.shape or labels.ndim != 1:
        raise InputError(
            f"sums and labels: expected [n] and [n], found {tuple(sums.shape)} and {tuple(labels.shape)}"
        )
    out = torch.zeros_like(labels, dtype=torch.bool)
    if not len(sums):
        return out
    ordered = sums.double().sort().values
    last = len(ordered) - 1
    low, high = float(ordered[round(0.25 * last)]), float(ordered[round(0.75 * last)])
    beyond = sums > high + fence * (high - low)
    for label in range(int(labels.max()) + 1):
        ours = labels == label
        candidates = (ours & beyond).nonzero().squeeze(1)
        farthest = sums[candidates].argsort(descending=True, stable=True)
        out[candidates[farthest[: int(most * int(ours.sum()))]]] = True
    return out


def _last_linear(model: nn.Module) -> str:
    """The path of the layer whose input the features are."""
    paths: list[str] = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not paths:
        raise InputError(
            "feature-squeezing: the model has no linear layer, so it is not known what its features are"
        )
    return paths[-1]


def _first_half(recipe: Recipe) -> tuple[int, ...]:
    """The first epoch, and those after a fifth and two fifths of the training."""
    return tuple(sorted({0, round(0.2 * recipe.epochs), round(0.4 * recipe.epochs)}))
