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

Up to 8,192 examples, all are measured. Of more, only those that are asked for, which is what stands out for
an answer: their spacings are estimated from 8,192 examples, drawn at random, whose thumbnails are kept.
Distances within a label of more than 4,096 are measured to as many of it, drawn at random, and the sum over
them stands for that over the label.

Cost: up to 8,192 examples a thumbnail of each, and n_y n distances in 768 dimensions for a label of n_y. Of
more, those thumbnails once and, for a label, whatever the number of examples, those of the k that are asked
for and of at most 4,096 others, which are read again whenever there are new ones: 8,192 (k + 4,096) +
4,096 k distances. Memory: these thumbnails, and 12 bytes an example.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Self, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unpoison._seeds import generator
from unpoison.data import Examples, TrainingSet
from unpoison.errors import InputError

_SIDE: Final = 16
# The width of likeness in spacings, and the neighbour whose distance is the spacing. Chosen on the
# development networks of `_decision`, from widths of 0.25 to 1 and neighbours 32 to 256;
# docs/delta_influence.md has the power with others.
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


@final
@dataclass(frozen=True, eq=False)
class NearDuplicates:
    """How many near-duplicates examples have, as far as this was asked for; `measure` adds to it.

    Arguments:
        multiplicities: Float64[n], 1 or more: how many examples of its label each example stands for, itself
            included; infinite where this is not measured.
        spacings: Float32[n], 0 where they are not measured.
        drawn: Int64[q], the examples that all are compared with.
        compared: Float[q d], their thumbnails; none where nothing remains to be measured.
        groups: Int64[n], equal for near-duplicates, where these are known.
    """

    multiplicities: Tensor
    spacings: Tensor
    drawn: Tensor
    compared: Tensor
    groups: Tensor | None = None

    @classmethod
    def of(cls, training_set: Examples, groups: Tensor | None = None) -> Self:
        """Those of a training set, all of them where this is cheap.

        Arguments:
            training_set: the examples; all stand for themselves alone where inputs are no images.
            groups: Int64[n], equal for near-duplicates; measured on the images when None.
        """
        labels = training_set.labels.cpu()
        count = len(labels)
        known, every = torch.ones(count, dtype=torch.float64), torch.ones(count)
        none = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 1)
        if groups is not None:
            pairs = torch.unique(groups * training_set.num_classes + labels, return_inverse=True)[1]
            return cls(torch.bincount(pairs)[pairs].double() if count else known, every, *none, groups)
        drawn = _drawn(count, _COMPARED, generator(0, "near-duplicates"))
        compared = thumbnails_at(training_set, drawn)
        if compared is None:
            return cls(known, every, *none)
        made = cls(known.fill_(torch.inf), every.fill_(0), drawn, compared)
        if len(drawn) < count:
            return replace(made, compared=compared.half().cpu())
        made.measure(training_set, drawn)
        return replace(made, drawn=none[0], compared=none[1])

    def measure(self, training_set: Examples, rows: Tensor) -> None:
        """Measure what is not yet known of the multiplicities of the examples at Int64[k] `rows`."""
        rows = torch.unique(rows[self.multiplicities[rows].isinf()])
        if not len(rows):
            return
        labels = training_set.labels.cpu()
        for label in sorted(set(labels[rows].tolist())):
            every, own = (labels == label).nonzero()[:, 0], rows[labels[rows] == label]
            chosen = every[_drawn(len(every), _MOST, generator(0, "near-duplicates", str(label)))]
            needed = torch.unique(torch.cat([own, chosen]))
            pixels = self._spaced(training_set, needed)
            assert pixels is not None
            asked, others = (torch.searchsorted(needed, part) for part in (own, chosen))
            self.multiplicities[own] = _alike(
                pixels, self.spacings[needed], asked, others, torch.isin(own, chosen), len(every)
            )

    def alike_among(self, training_set: Examples, members: Tensor) -> Tensor:
        """Float64[m]: how many of the examples Int64[m] `members` each of them resembles, itself included."""
        if self.groups is not None:
            own = self.groups[members]
            return torch.bincount(own)[own].double() if len(own) else own.double()
        pixels = self._spaced(training_set, members)
        if pixels is None:
            return torch.ones(len(members), dtype=torch.float64)
        every = torch.arange(len(members))
        chosen = _drawn(len(members), _MOST, generator(0, "near-duplicates", "members"))
        among = torch.isin(every, chosen)
        return _alike(pixels, self.spacings[members], every, chosen, among, len(members))

    def likeness(self, training_set: Examples, rows: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Of Int64[a] and Int64[b] places among Int64[k] `rows`, Float[a b]: S_jk of these examples."""
        if self.groups is not None:
            own = self.groups[rows]
            return lambda of, to: (own[of, None] == own[to]).double()
        pixels = self._spaced(training_set, rows)
        if pixels is None:
            return lambda of, to: (of[:, None] == to).double()
        spacings = self.spacings[rows].to(pixels.device)
        return lambda of, to: _likeness(pixels, spacings, of.to(pixels.device), to.to(pixels.device)).cpu()

    def _spaced(self, training_set: Examples, rows: Tensor) -> Tensor | None:
        """The thumbnails of the examples at Int64[k] `rows`, whose spacings are then known."""
        count = len(self.spacings)
        whole = len(self.compared) == count
        pixels = self.compared[rows.to(self.compared.device)] if whole else thumbnails_at(training_set, rows)
        unknown = self.spacings[rows] == 0
        if pixels is not None and bool(unknown.any()):
            among, others = torch.isin(rows[unknown], self.drawn), self.compared.to(pixels)
            found = _spacings(pixels[unknown.to(pixels.device)], others, among.to(pixels.device), count)
            self.spacings[rows[unknown]] = found.cpu()
        return pixels


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


def _alike(
    pixels: Tensor, spacings: Tensor, asked: Tensor, others: Tensor, among: Tensor, count: int
) -> Tensor:
    """Float64[k], on the CPU, 1 or more: how many of `count` examples each of some resembles.

    Arguments:
        pixels: Float32[m d] thumbnails.
        spacings: Float32[m], theirs.
        asked: Int64[k], the places of those that are asked for.
        others: Int64[q], of those that they are compared with, drawn from all.
        among: Bool[k], which of the k are themselves among the q.
        count: how many there are in all.
    """
    spacings = spacings.to(pixels.device)
    given, there = (part.to(pixels.device) for part in (asked, others))
    sums = [
        _likeness(pixels, spacings, part, there).sum(1, dtype=torch.float64)
        for part in torch.split(given, _CHUNK)
    ]
    total = torch.cat([pixels.new_zeros(0, dtype=torch.float64), *sums]).cpu()
    return (1 + (total - among.double()) * ((count - 1) / max(len(others) - 1, 1))).clamp_(min=1)


def _likeness(pixels: Tensor, spacings: Tensor, of: Tensor, to: Tensor) -> Tensor:
    """Float32[a b]: S_jk, of Int64[a] and Int64[b] places among Float32[m d] thumbnails."""
    squares = _squared_distances(pixels[of], pixels[to])
    return squares.mul_(-1 / (_WIDTH**2 * spacings[to])).div_(spacings[of, None]).exp_()


def _spacings(pixels: Tensor, others: Tensor, among: Tensor, count: int) -> Tensor:
    """Float32[m]: the distances to the neighbour among all.

    Arguments:
        pixels: Float32[m d] thumbnails.
        others: Float32[q d], those that they are compared with, drawn from all.
        among: Bool[m], which of the m are themselves among the q.
        count: how many there are in all.
    """
    rank = max(1, round(min(_NEIGHBOUR, count // _NEAREST) * len(others) / max(count, 1)))
    last, found = min(rank, len(others) - 1), []
    for part, itself in zip(torch.split(pixels, _CHUNK), torch.split(among, _CHUNK), strict=True):
        # NumPy's selection is four times as fast as topk.
        ordered = np.partition(_squared_distances(part, others).cpu().numpy(), last, axis=1)
        nearest = np.where(itself.cpu().numpy(), ordered[:, last], ordered[:, : max(last, 1)].max(1))
        found.append(torch.from_numpy(nearest).to(part))
    return torch.cat(found).clamp(min=_EQUAL**2).sqrt() if found else pixels.new_zeros(0)


def _squared_distances(pixels: Tensor, others: Tensor) -> Tensor:
    """Float32[m q]: of Float32[m d] and Float32[q d] thumbnails."""
    own, theirs = pixels.square().sum(1), others.square().sum(1)
    return torch.addmm(theirs, pixels, others.t(), alpha=-2).add_(own[:, None]).clamp_(min=0)


def _drawn(count: int, most: int, randomness: torch.Generator) -> Tensor:
    """Int64: all of 0..count-1, or `most` of them."""
    return torch.arange(count) if count <= most else torch.randperm(count, generator=randomness)[:most]
