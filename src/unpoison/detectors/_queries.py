"""The queries of Delta-Influence: an input with its label as it is, and under random changes.

A draw (x_i, y_i) = g_i(x, y) applies one of seven image transformations (`_transforms`), chosen uniformly,
and replaces the label y by another one. Images that are not of 8 bits are changed in the range of the values
that the dataset gives, from black at its lowest to white at its highest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeGuard, final

import torch
from torch import Tensor

from unpoison.data import DatasetExamples, Examples, Inputs, TrainingSet
from unpoison.detectors._findings import Draw
from unpoison.detectors._transforms import TRANSFORMS
from unpoison.errors import InputError

Labels = Literal["uniform", "distinct"]
Space = Literal["pixels", "normalized"]
Changes = Literal["both", "image", "label"]


@final
@dataclass(frozen=True)
class Drawing:
    """How queries are changed.

    Arguments:
        draws: how many changed copies of an input, at least 1.
        labels: how other labels are drawn: `uniform`, independently (published for 10 classes), or
            `distinct`, without repetition while there are labels left (published for 100 classes).
        space: what the transformations work on: `pixels` in [0, 1], or, as in the published code,
            `normalized` z-scores, on which inversion and jitter act differently.
        changes: what a draw changes: `both`, or for ablations the `image` or the `label` alone.

    """

    draws: int
    labels: Labels
    space: Space
    changes: Changes

    def queries(
        self, images: Inputs, label: int, training_set: Examples, randomness: torch.Generator
    ) -> Queries:
        """Images, UInt8[m c h w] or Float as the model takes them, with their label, and draws of each.

        Raises:
            InputError: the inputs are no images.
        """
        if not _of_images(training_set) or not isinstance(images, Tensor):
            raise InputError(
                f"{training_set.name}: Delta-Influence's variations are of images [c, h, w], found inputs of "
                f"shape {training_set.input_shape}; trace with ek-fac, trak or calibrated"
            )
        mean, std = (torch.tensor(part)[:, None, None] for part in training_set.channel_statistics)
        low, high = (0.0, 1.0) if isinstance(training_set, TrainingSet) else training_set.value_range
        pixels = images.cpu().float() / (255 if images.dtype == torch.uint8 else 1)
        # On grey images the exchange of red and green changes nothing, which is no draw of the image alone.
        idle = self.changes == "image" and len(mean) == 1
        names = [name for name in TRANSFORMS if not (idle and name == "colour switch")]
        inputs, labels, draws = [pixels], [torch.full((len(images),), label)], []
        for image in pixels:
            if self.changes == "image":
                others = torch.full((self.draws,), label)
            else:
                others = other_labels(self.labels, label, training_set.num_classes, self.draws, randomness)
            for other in others.tolist():
                name = names[int(torch.randint(len(names), (), generator=randomness))]
                if self.changes == "label":
                    name, changed = "none", image
                elif self.space == "pixels" and (low, high) == (0.0, 1.0):
                    changed = TRANSFORMS[name](image, randomness)
                elif self.space == "pixels":
                    changed = TRANSFORMS[name]((image - low) / (high - low), randomness)
                    changed = changed * (high - low) + low
                else:
                    changed = TRANSFORMS[name]((image - mean) / std, randomness) * std + mean
                inputs.append(changed[None])
                draws.append(Draw(name, other))
            labels.append(others)
        return Queries(torch.cat(inputs), torch.cat(labels), tuple(draws), len(images), (low, high))


def _of_images(training_set: Examples) -> TypeGuard[TrainingSet | DatasetExamples]:
    """Whether the inputs are images, which the transformations change."""
    if isinstance(training_set, DatasetExamples):
        return training_set.of_images
    return isinstance(training_set, TrainingSet)


@final
@dataclass(frozen=True, eq=False)
class Queries:
    """Inputs Float[q c h w] with labels Int64[q]: `originals` unchanged ones, then the draws of each.

    `value_range` is that of the inputs, from black to white.
    """

    inputs: Tensor
    labels: Tensor
    draws: tuple[Draw, ...]
    originals: int
    value_range: tuple[float, float] = (0.0, 1.0)

    def every_difference(self) -> Tensor:
        """Float[1 + draws, q]: the mean of the originals, then each draw minus its original."""
        count = len(self.draws)
        own = torch.arange(self.originals).repeat_interleave(count // self.originals)
        combine = torch.zeros(1 + count, self.originals + count)
        combine[0, : self.originals] = 1 / self.originals
        draws = torch.arange(count)
        combine[1 + draws, self.originals + draws] = 1.0
        combine[1 + draws, own] = -1.0
        return combine

    def mean_difference(self) -> Tensor:
        """Float[1, q]: the mean of the draws minus the mean of the originals."""
        return self.every_difference()[1:].mean(0, keepdim=True)

    def draw_images(self) -> Tensor:
        """UInt8[draws c h w]: the changed inputs, rounded to pictures."""
        low, high = self.value_range
        drawn = (self.inputs[self.originals :] - low) / (high - low)
        return (drawn.clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def other_labels(how: Labels, label: int, classes: int, count: int, randomness: torch.Generator) -> Tensor:
    """Int64[count] of labels that are not `label`."""
    if how == "uniform":
        drawn = torch.randint(classes - 1, (count,), generator=randomness)
    else:
        rounds = -(-count // (classes - 1))
        drawn = torch.cat([torch.randperm(classes - 1, generator=randomness) for _ in range(rounds)])[:count]
    return drawn + (drawn >= label)
