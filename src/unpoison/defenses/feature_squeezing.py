"""Feature squeezing: drop the examples that the network sees otherwise once they are recompressed.

Ours, after Xu, Evans and Qi, "Feature Squeezing: Detecting Adversarial Examples in Deep Neural Networks"
(NDSS 2018, arXiv 1704.01155), which compares the answers to an input and to a squeezed copy of it at test
time. A clean-label poison is an adversarial example of a kind: its pixels were tuned until its gradient,
which is made of its features, points where the adversary wants, and the tuning does not outlive a change that
no eye sees. So this looks at the training set itself:

I    squeeze    every training image once, by JPEG.
II   displace   In a round, for each example the distance between the features (what the last linear layer is
                given) of the image and of its squeezed copy, in eval mode.
III  stand out  What lies beyond the fence of all distances, `Q3 + fence (Q3 - Q1)`, is out; of each class at
                most a given share, the farthest first. Each round decides anew, so a clean example that a raw
                network saw otherwise comes back.

The first round is before the first step, for a network that was trained before, as in fine-tuning: what is
dropped there never acts. A network that answers most of the set wrongly is not asked; from scratch the rounds
of the first half of the training are those that matter. Unlike EPIC, and `Isolation`, it does not need
poisons to be lonely: it finds them where they crowd in the midst of their class.

Cost: the recompression once, some seconds for 50,000 images of 32x32, and two forward passes a round, of
which there are few. Memory: one copy of the training set, 8 bits a value.

Limits: poison that is not tuned to a network (patches, wrong labels) stays where it is; an adversary who
knows of it compresses while crafting, which costs him part of his strength. JPEG knows grey and colour only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from unpoison.data import TrainingSet
from unpoison.defenses._dropping import DroppingDefense, Drops
from unpoison.defenses.jpeg import JPEG, recompressed
from unpoison.errors import InputError
from unpoison.models import FeatureTap
from unpoison.training import Recipe

_BATCH: Final = 512


@final
@dataclass(frozen=True, kw_only=True)
class FeatureSqueezing(DroppingDefense):
    """Drop what does not look the same to the network once it is recompressed.

    Arguments:
        quality: of the JPEG encoder, 1 (worst) to 95.
        fence: how many interquartile ranges above the upper quartile of all distances an example stands out,
            0 or more.
        most: the share of each class that may be out, in [0, 1].
        ready: the share of examples that must be answered as labelled before a round drops anything.
        epochs: those with a round, ascending; None is the first and two more in the first half of the recipe.

    Raises:
        InputError: a value is out of its range.

    >>> FeatureSqueezing.for_recipe(Recipe(epochs=40, schedule="cosine")).epochs
    (0, 8, 16)
    """

    quality: int = 75
    fence: float = 1.0
    most: float = 0.3
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

    def _is_round(self, epoch: int, recipe: Recipe | None) -> bool:
        if self.epochs is not None:
            return epoch in self.epochs
        return epoch == 0 if recipe is None else epoch in _first_half(recipe)

    def _look(self, model: nn.Module, training_set: TrainingSet) -> Tensor:
        """Float[n 2]: how far each example's features move, and whether it is answered as labelled."""
        if not self._squeezed:
            self._squeezed[:] = [recompressed(training_set.images, quality=self.quality)]
        squeezed = self._squeezed[0].to(training_set.device)
        head = _last_linear(model)
        rows = []
        with torch.no_grad():
            for start in range(0, len(training_set), _BATCH):
                images, labels = training_set.batch(start, start + _BATCH)
                with FeatureTap(model, head, side="input") as tap:
                    right = model(images).argmax(1) == labels
                    features = tap.value.flatten(1)
                    model(squeezed[start : start + _BATCH].float().div(255))
                    displaced = torch.linalg.vector_norm(tap.value.flatten(1) - features, dim=1)
                rows.append(torch.stack([displaced, right.to(displaced.dtype)], 1))
        return torch.cat(rows)

    def _out(
        self, epoch: int, logits: Tensor | None, labels: Tensor, included: Tensor, alive: Tensor
    ) -> Tensor:
        assert logits is not None
        displaced, right = logits[:, 0], logits[:, 1]
        if float(right[included].double().mean()) < self.ready:
            return included & ~alive
        among = fragile(displaced[included], labels[included], fence=self.fence, most=self.most)
        out = torch.zeros_like(included)
        out[included] = among
        return out


def fragile(displaced: Tensor, labels: Tensor, *, fence: float = 1.0, most: float = 0.3) -> Tensor:
    """Bool[n]: the examples whose features move farther than they should when the images are squeezed.

    For a loop of your own: features of the images less features of their recompressed copies, and what it
    says is what not to train on.

    Arguments:
        displaced: Float[n], the distances; or Float[n d], the displacements.
        labels: Int64[n].
        fence: how many interquartile ranges above the upper quartile a distance stands out.
        most: the share of each class that may be named, in [0, 1].

    Raises:
        InputError: the shapes do not fit, or a displacement is not finite.

    >>> distances = torch.tensor([1.0, 1.1, 0.9, 1.0, 1.2, 0.8, 1.0, 5.0])
    >>> fragile(distances, torch.zeros(8, dtype=torch.int64)).nonzero().flatten().tolist()
    [7]
    """
    distances = torch.linalg.vector_norm(displaced, dim=1) if displaced.ndim == 2 else displaced
    if distances.shape != labels.shape or labels.ndim != 1:
        raise InputError(
            f"displaced and labels: expected [n] or [n d], and [n], found {tuple(displaced.shape)} and "
            f"{tuple(labels.shape)}"
        )
    wrong = ~distances.isfinite()
    if bool(wrong.any()):
        raise InputError(
            f"displaced: {int(wrong.sum())} of {len(distances)} examples have features that are not finite, "
            f"the first at index {int(wrong.nonzero()[0])}; the training has diverged"
        )
    out = torch.zeros_like(wrong)
    if not len(distances):
        return out
    low, high = _quartiles(distances)
    beyond = distances > high + fence * (high - low)
    for label in labels.unique().tolist():
        ours = labels == label
        candidates = (ours & beyond).nonzero().squeeze(1)
        farthest = distances[candidates].argsort(descending=True, stable=True)
        out[candidates[farthest[: int(most * int(ours.sum()))]]] = True
    return out


def _quartiles(values: Tensor) -> tuple[float, float]:
    """`torch.quantile` refuses more than 16 million values; the nearest ranks do as well."""
    ordered = values.double().sort().values
    last = len(ordered) - 1
    return float(ordered[round(0.25 * last)]), float(ordered[round(0.75 * last)])


def _last_linear(model: nn.Module) -> str:
    """The path of the layer whose input the features are."""
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not paths:
        raise InputError(
            "feature-squeezing: the model has no linear layer, so it is not known what its features are"
        )
    return paths[-1]


def _first_half(recipe: Recipe) -> tuple[int, ...]:
    """The first epoch, and those after a fifth and two fifths of the training."""
    return tuple(sorted({0, round(0.2 * recipe.epochs), round(0.4 * recipe.epochs)}))
