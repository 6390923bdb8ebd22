"""How many near-duplicates an example has, so that a series of them counts once.

A natural error often goes back to one series of near-duplicates (the frames of one film, the pictures of one
patient), poison to many unrelated images. Where groups are known, the near-duplicates of an example are the
members of its group with its label. Where they are not, likeness is measured on thumbnails of 16 x 16 pixels
with the mean removed and unit norm: the examples j and k of a label count as

    S_jk = exp(-(d_jk / (0.35 median d))^2),

the median being that of all pairs of the label, and the multiplicity of j is the sum of S_jk over k
(similarity-sensitive diversity; Leinster and Cobbold, "Measuring diversity: the importance of species
similarity", 2012). Nothing is clustered, so that a chain of similar images does not become one group.

Cost: a thumbnail an example, and n_y^2 distances in 768 dimensions for a label of n_y examples; from 4,096
examples on, distances to 4,096 of them, drawn at random.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from unpoison._seeds import generator
from unpoison.data import Examples, TrainingSet
from unpoison.errors import InputError

_SIDE: Final = 16
_WIDTH: Final = 0.35
_MOST: Final = 4096
_CHUNK: Final = 1024
_BATCH: Final = 128


def group_numbers(groups: Sequence[Hashable] | Tensor, count: int) -> Tensor:
    """Int64[count]: the groups, numbered in the order of their first members.

    Raises:
        InputError: there is not one group for each of the examples.
    """
    known = groups.tolist() if isinstance(groups, Tensor) else list(groups)
    if len(known) != count:
        raise InputError(f"groups: needs one for each of the {count} training examples, found {len(known)}")
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(group, len(numbers)) for group in known], dtype=torch.int64)


def multiplicities(training_set: Examples, groups: Tensor | None = None) -> Tensor:
    """Float64[n], 1 or more: how many examples of its label each example stands for, itself included.

    Arguments:
        training_set: the examples.
        groups: Int64[n], equal for near-duplicates; measured on the images when None, and 1 for inputs that
            are no images.
    """
    labels = training_set.labels.cpu()
    if groups is not None:
        pairs = torch.unique(groups * training_set.num_classes + labels, return_inverse=True)[1]
        return torch.bincount(pairs)[pairs].double() if len(pairs) else torch.ones(0).double()
    result = torch.ones(len(labels), dtype=torch.float64)
    for label in set(labels.tolist()):
        rows = (labels == label).nonzero()[:, 0]
        pixels = thumbnails_at(training_set, rows)
        if pixels is None:
            break
        result[rows] = _of_images(pixels)
    return result


def alike_among(examples: Examples, members: Tensor, groups: Tensor | None = None) -> Tensor:
    """Float64[m]: how many of the members each of them resembles, itself included.

    Arguments:
        examples: k examples with one label, whose distances are the measure; up to 1,024 are read.
        members: Int64[m] places among them.
        groups: Int64[k], equal for near-duplicates; measured on the images when None, and 1 for inputs that
            are no images.
    """
    if groups is not None:
        own = groups[members]
        return torch.bincount(own)[own].double()
    some = _spread(len(examples))
    pixels = thumbnails_at(examples, torch.cat([some, members]))
    if pixels is None:
        return torch.ones(len(members), dtype=torch.float64)
    return similar_to(pixels[len(some) :], median_distance(pixels[: len(some)]))


def thumbnails_at(examples: Examples, rows: Tensor) -> Tensor | None:
    """`thumbnails` of the examples at Int64[k] `rows`, read in batches; None where inputs are no images."""
    if isinstance(examples, TrainingSet):
        return thumbnails(examples.images[rows.to(examples.device)])
    if isinstance(examples.input_shape, Mapping) or len(examples.input_shape) != 3:
        return None
    return torch.cat([thumbnails(inputs) for inputs, *_ in examples.in_batches(_BATCH, rows)])


def thumbnails(images: Tensor) -> Tensor:
    """Float32[m d] of unit norm: UInt8 or Float[m c h w] images of 16 x 16 pixels without their mean."""
    parts = [
        F.adaptive_avg_pool2d(part.float(), _SIDE).flatten(1)
        for part in torch.split(images, _CHUNK)
        if len(part)
    ]
    pixels = torch.cat(parts) if parts else torch.zeros(0, 1)
    return F.normalize(pixels - pixels.mean(1, keepdim=True))


def similar_to(pixels: Tensor, unit: Tensor, others: Tensor | None = None) -> Tensor:
    """Float64[m], on the CPU: the sums over k of S_jk, 1,024 thumbnails at a time.

    Arguments:
        pixels: Float32[m d] thumbnails j.
        unit: the median distance.
        others: Float32[q d] thumbnails k; the same by default.
    """
    others = pixels if others is None else others
    sums = [
        torch.exp(-((torch.cdist(part, others) / (_WIDTH * unit)) ** 2)).double().sum(1)
        for part in torch.split(pixels, _CHUNK)
    ]
    return torch.cat(sums).cpu()


def median_distance(pixels: Tensor) -> Tensor:
    """The median distance of different rows of Float32[m d], of at most 1,024 of them; at least 1e-6."""
    distances = torch.pdist(pixels[_spread(len(pixels))])
    return distances.median().clamp(min=1e-6) if len(distances) else pixels.new_tensor(1.0)


def _spread(count: int) -> Tensor:
    """Int64: at most 1,024 of 0..count-1, evenly spread."""
    return torch.arange(0, count, max(1, -(-count // _CHUNK)))


def _of_images(pixels: Tensor) -> Tensor:
    count, unit = len(pixels), median_distance(pixels)
    chosen = torch.arange(count)
    if count > _MOST:
        chosen = torch.randperm(count, generator=generator(0, "near-duplicates"))[:_MOST]
    sums = similar_to(pixels, unit, pixels[chosen.to(pixels.device)])
    itself = torch.zeros(count, dtype=torch.float64)
    itself[chosen] = 1
    return (1 + (sums - itself) * ((count - 1) / max(len(chosen) - 1, 1))).clamp(min=1)
