"""How many near-duplicates an example has, so that a series of them counts once.

A natural error often goes back to one series of near-duplicates (the frames of one film, the pictures of one
patient), poison to many unrelated images. Where groups are known, the near-duplicates of an example are the
members of its group with its label. Where they are not, likeness is measured on thumbnails of 16 x 16 pixels
with the mean removed and unit norm: the examples j and k of a label count as

    S_jk = exp(-d_jk^2 / (0.25 s_j s_k)),

where the spacing s_j is the distance from j to its 128th nearest neighbour among all examples, whatever their
labels (a local scale; Zelnik-Manor and Perona, "Self-tuning spectral clustering", 2004), and the multiplicity
of j is the sum of S_jk over k (similarity-sensitive diversity; Leinster and Cobbold, "Measuring diversity:
the importance of species similarity", 2012). Two images of a common kind of object are close to each other
and to many more, so they are no near-duplicates; the frames of a film are close to each other alone. Nothing
is clustered, so that a chain of similar images does not become one group.

Cost: a thumbnail an example, and n_y n distances in 768 dimensions for a label of n_y examples; from 8,192
examples on, spacings are estimated from 8,192 of them, drawn at random and read once more, and distances
within a label of more than 4,096 from as many. Memory: the thumbnails of these and of one label.
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
_WIDTH: Final = 0.5
_NEIGHBOUR: Final = 128
# A neighbour is among the nearest eighth also of a small set.
_NEAREST: Final = 8
# Thumbnails that are this close are equal to the eye; in float32 distances are exact to about 0.001.
_EQUAL: Final = 0.02
_COMPARED: Final = 8192
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


def multiplicities(training_set: Examples, groups: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Float64[n], 1 or more: how many examples of its label each example stands for, itself included.

    And Float32[n], the spacings, where they are measured; else 1.

    Arguments:
        training_set: the examples.
        groups: Int64[n], equal for near-duplicates; measured on the images when None, and 1 for inputs that
            are no images.
    """
    labels = training_set.labels.cpu()
    count = len(labels)
    result, spacings = torch.ones(count, dtype=torch.float64), torch.ones(count)
    if groups is not None and count:
        pairs = torch.unique(groups * training_set.num_classes + labels, return_inverse=True)[1]
        return torch.bincount(pairs)[pairs].double(), spacings
    randomness = generator(0, "near-duplicates")
    compared = _drawn(count, _COMPARED, randomness)
    others = thumbnails_at(training_set, compared)
    if others is None:
        return result, spacings
    places = torch.full((count,), -1)
    places[compared] = torch.arange(len(compared))
    for label in set(labels.tolist()):
        rows = (labels == label).nonzero()[:, 0]
        pixels = others[places[rows].to(others.device)] if len(compared) == count else None
        if pixels is None:
            pixels = thumbnails_at(training_set, rows)
            assert pixels is not None
        own = _spacings(pixels, others, (places[rows] >= 0).to(pixels.device), count)
        chosen = _drawn(len(rows), _MOST, randomness).to(pixels.device)
        sums = similar_to(pixels, own, pixels[chosen], own[chosen])
        itself = torch.zeros(len(rows), dtype=torch.float64)
        itself[chosen.cpu()] = 1
        scale = (len(rows) - 1) / max(len(chosen) - 1, 1)
        result[rows] = (1 + (sums - itself) * scale).clamp(min=1)
        spacings[rows] = own.cpu()
    return result, spacings


def alike_among(
    examples: Examples, members: Tensor, spacings: Tensor, groups: Tensor | None = None
) -> Tensor:
    """Float64[m]: how many of the members each of them resembles, itself included.

    Arguments:
        examples: k examples with one label.
        members: Int64[m] places among them.
        spacings: Float32[k], of `multiplicities`.
        groups: Int64[k], equal for near-duplicates; measured on the images when None, and 1 for inputs that
            are no images.
    """
    if groups is not None:
        own = groups[members]
        return torch.bincount(own)[own].double()
    pixels = thumbnails_at(examples, members)
    if pixels is None:
        return torch.ones(len(members), dtype=torch.float64)
    unit = spacings[members].to(pixels.device)
    return similar_to(pixels, unit, pixels, unit)


def thumbnails_at(examples: Examples, rows: Tensor) -> Tensor | None:
    """`thumbnails` of the examples at Int64[k] `rows`, read in batches; None where inputs are no images."""
    if isinstance(examples, TrainingSet):
        return thumbnails(examples.images[rows.to(examples.device)])
    if isinstance(examples.input_shape, Mapping) or len(examples.input_shape) != 3:
        return None
    if not len(rows):
        return torch.zeros(0, 1)
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


def similar_to(pixels: Tensor, spacings: Tensor, others: Tensor, other_spacings: Tensor) -> Tensor:
    """Float64[m], on the CPU: the sums over k of S_jk, 1,024 thumbnails at a time.

    Arguments:
        pixels: Float32[m d] thumbnails j.
        spacings: Float32[m], theirs.
        others: Float32[q d] thumbnails k.
        other_spacings: Float32[q], theirs.
    """
    units = torch.split(_WIDTH**2 * spacings, _CHUNK)
    sums = [
        torch.exp(-torch.cdist(part, others).square() / (unit[:, None] * other_spacings)).double().sum(1)
        for part, unit in zip(torch.split(pixels, _CHUNK), units, strict=True)
    ]
    return torch.cat(sums).cpu()


def _spacings(pixels: Tensor, others: Tensor, among: Tensor, count: int) -> Tensor:
    """Float32[m]: the distances to the neighbour among all.

    Arguments:
        pixels: Float32[m d] thumbnails.
        others: Float32[q d], those that they are compared with, drawn from all.
        among: Bool[m], which of the m are themselves among the q.
        count: how many there are in all.
    """
    rank = max(1, round(min(_NEIGHBOUR, count // _NEAREST) * len(others) / max(count, 1)))
    found = []
    for part, itself in zip(torch.split(pixels, _CHUNK), torch.split(among, _CHUNK), strict=True):
        nearest = torch.cdist(part, others).topk(min(rank + 1, len(others)), largest=False).values
        found.append(torch.where(itself, nearest[:, -1], nearest[:, min(rank, len(others)) - 1]))
    return torch.cat(found).clamp(min=_EQUAL) if found else pixels.new_zeros(0)


def _drawn(count: int, most: int, randomness: torch.Generator) -> Tensor:
    """Int64: all of 0..count-1, or `most` of them."""
    return torch.arange(count) if count <= most else torch.randperm(count, generator=randomness)[:most]
