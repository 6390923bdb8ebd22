"""`Sketcher`: per-example gradients in the metric of the inverse curvature, sketched as they are formed.

For a layer with EK-FAC factors Q_a, Q_g, Lambda and the gradient G_j of example j,

    W_j = (Q_g^T G_j Q_a) / sqrt(Lambda + damping),

so that <W_j, W_k>, summed over the layers, is the influence of j on k. It is sketched to D numbers. A layer
of p numbers gets a share D_l of them in proportion to its expected |W|^2, which makes the error of an inner
product least, and at most p: layers that are small are kept as they are. So are in the others the numbers
with the largest expected squares, which make up most of |W|^2. The rest R_j get random signs, and those whose
places are equal modulo the number b of buckets are added up: a count sketch (Charikar, Chen and
Farach-Colton, 2002) with buckets of equal size, b being prime to the numbers of rows and columns, so that no
bucket is a column. Inner products are kept on average, with a deviation of about |R_j| |R_k| / sqrt(b). |W_j|
and |G_j| are exact.

A rotation takes nine forward passes of a 3x3 convolution. But for most directions Lambda is far below the
damping, so that they have nearly the same weight, and a space of these can be left as it is: for directions F
of the wider side of a sketched layer,

    G_j = N_j + F_j,  N_j = G_j Q_N Q_N^T  (rotated, as above)  and  F_j = G_j - N_j  (not rotated, one weight
    an output),

with the fewest directions N for which the expected square of the error of W is at most 1e-3 of |W|^2
(`near_directions`). That takes 2 |N| / i of the rotation, and is done where this is at most 3 / 4.

Cost: an example takes one forward and one backward pass without parameter gradients and, beside its gradient,
one rotation of it, or part of one, into the eigenbasis and p additions. Memory: n D
numbers, 4 bytes a tracked parameter, the factors, the activations of one batch, and twice `workspace_bytes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from unpoison._seeds import generator
from unpoison.influence._factors import Factors, LayerFactors, rotated, times
from unpoison.influence._layers import Layer, Scratch, outer
from unpoison.influence._queries import Damping, inverse
from unpoison.influence._sweep import Sweeper, Visitor
from unpoison.influence._tracked import tracked_layers
from unpoison.tasks import Batch

# The error of W by directions that are not rotated: its expected square, of that of W.
_SHARE: Final = 1e-3
_WIDE: Final = 128


@final
@dataclass(frozen=True, eq=False)
class Sketches:
    """Sketched gradients of b examples, on the model's device.

    Arguments:
        rows: Float[b D].
        lengths: Float64[b], |W|, whose square is the example's influence on itself.
        norms: Float64[b], the norm of the gradient over all tracked parameters.
        values: Float[b], the function whose gradients they are.
    """

    rows: Tensor
    lengths: Tensor
    norms: Tensor
    values: Tensor


def widths(factors: Factors, damping: Damping, dimensions: int) -> list[int]:
    """How many of the D numbers each layer gets, in the order of the factors; in all at most D.

    >>> import torch
    >>> from unpoison.influence import AbsoluteDamping, LayerFactors
    >>> small, large = (LayerFactors(None, None, torch.ones(1, 1, n)) for n in (10, 1000))
    >>> widths(Factors({"a": small, "b": large}, "", "", {}), AbsoluteDamping(1.0), 101)
    [1, 100]
    """
    layers = list(factors.layers.values())
    sizes = [one.eigenvalues.numel() for one in layers]
    energies = [float((one.eigenvalues.double() * inverse(one, damping).double()).sum()) for one in layers]
    chosen, open_ = [0] * len(layers), set(range(len(layers)))
    left = dimensions
    while open_:
        total = sum(energies[index] for index in open_)
        shares = {
            index: left * energies[index] / total if total > 0 else left / len(open_) for index in open_
        }
        whole = {index for index in open_ if shares[index] >= sizes[index]}
        if not whole:
            for index in open_:
                chosen[index] = max(1, int(shares[index]))
            break
        for index in whole:
            chosen[index] = sizes[index]
            left -= sizes[index]
        open_ -= whole
    return chosen


def _prime_to(width: int, size: int) -> int:
    """The largest number up to `width` that has no factor in common with `size`."""
    return next(number for number in range(width, 0, -1) if math.gcd(number, size) == 1)


def near_directions(eigenvalues: Tensor, weights: Tensor, share: float) -> tuple[Tensor, int]:
    """Int64[i] inputs in the order of their energy; and the least number of the last of them without which
    one weight an output does for the others.

    Arguments:
        eigenvalues: Float[k o i].
        weights: Float[k o i] of rotated gradients, whose mean squares are the eigenvalues.
        share: of the expected square of what is weighted, that the error may be.
    """
    order = eigenvalues.sum((0, 1)).argsort()
    squares, weights = (part.double()[..., order] for part in (eigenvalues, weights))
    energy = (squares * weights.square()).cumsum(-1)
    # Of the first directions: the squares less those of the best weight.
    error = energy - (squares * weights).cumsum(-1).square() / squares.cumsum(-1).clamp(min=1e-300)
    fitting = (error.sum((0, 1)) <= share * energy[..., -1].sum()).nonzero()[:, 0]
    return order, len(order) - (int(fitting[-1]) + 1 if len(fitting) else 0)


@final
class Sketcher:
    """Sketches gradients of one function; use inside `with`.

    Arguments:
        model: the model that the factors were fitted to; used in evaluation mode and left as it was.
        factors: from `fit_factors`.
        damping: of the curvature.
        function: of the model and a batch, e.g. `task.measurement`; one number an example.
        dimensions: D, at most.
        seed: of the signs.
        reweighted: another damping, to be used for queries: their products with sketches that were made with
            `damping` are influences with this one.
        workspace_bytes: of per-example gradients at a time; default 8 MiB, on CUDA 1 GiB.
        memory: see `Sweeper`.
    """

    def __init__(
        self,
        model: nn.Module,
        factors: Factors,
        damping: Damping,
        function: Callable[[nn.Module, Batch], Tensor],
        *,
        dimensions: int,
        seed: int,
        reweighted: Damping | None = None,
        workspace_bytes: int | None = None,
        memory: int | None = None,
    ) -> None:
        layers = tracked_layers(model, list(factors.layers))
        self._function = function
        self._sweeper = Sweeper(model, layers, workspace_bytes=workspace_bytes, memory=memory)
        device, dtype = self._sweeper.device, self._sweeper.dtype
        sizes = widths(factors, damping, dimensions)
        parts = []
        for layer, width in zip(layers, sizes, strict=True):
            own = factors.layers[layer.name].to(device, dtype)
            root = inverse(own, damping).sqrt()
            split = _Split.of(own, root, width)
            kept, buckets = _kept(own.eigenvalues, root, split, width)
            if reweighted is not None:
                root = torch.where(root > 0, inverse(own, reweighted) / root, root)
            signs = generator(seed, "sketch", layer.name)
            if split is not None:
                split, root = split.weighted(own.eigenvalues, root, signs)
            root = _signed(root, signs) if width < root.numel() else root
            parts.append(_Part(own, root, split, kept, buckets))
        self._visitor = _Rows(layers, parts, self._sweeper)
        self.dimensions, self.device, self.dtype = sum(sizes), device, dtype

    def __enter__(self) -> Sketcher:
        self._sweeper.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._sweeper.__exit__(*error)

    def batch(self, batch: Batch, count: int) -> Sketches:
        """The sketches of a batch of `count` examples."""
        visitor = self._visitor
        visitor.begin(count, self.dimensions)
        values = self._sweeper.batch(batch, self._function, visitor)
        return Sketches(visitor.rows, visitor.lengths.sqrt(), visitor.norms.sqrt(), values)


@final
@dataclass(frozen=True, eq=False)
class _Part:
    """A layer: its factors, Float[k o i] signs over sqrt(Lambda + damping), which directions are rotated,
    Int64[e] the places of the numbers that are kept, of these directions, and the number of buckets."""

    factors: LayerFactors
    roots: Tensor
    split: _Split | None
    kept: Tensor
    buckets: int

    @property
    def width(self) -> int:
        """How many numbers the layer gets."""
        return len(self.kept) + self.buckets


def _kept(eigenvalues: Tensor, weights: Tensor, split: _Split | None, width: int) -> tuple[Tensor, int]:
    """Int64[e]: the places of the numbers of a layer that are not added up; and the number of buckets.

    Those with the largest expected squares, as many as make the expected error of the others' products least.
    """
    squares = (eigenvalues * weights.square()).double()
    total, size = squares.sum(), squares.numel()
    if width >= size:
        return torch.zeros(0, dtype=torch.int64, device=squares.device), width
    if split is not None:
        squares = _exchanged(squares, split.turned)[..., split.near]
        size *= len(split.near)
    ordered = squares.flatten().sort(descending=True)
    sums = torch.cat([total.new_zeros(1), ordered.values.cumsum(0)])
    tried = sorted({min(width * part // 8, len(sums) - 1) for part in range(8)})
    errors = [float((total - sums[count]).square()) / (width - count) for count in tried]
    best = tried[errors.index(min(errors))]
    # No factor in common with the rows, or else a column would be few buckets.
    buckets = _prime_to(width - best, size)
    count = min(width - buckets, len(sums) - 1)
    return ordered.indices[:count], buckets


@final
@dataclass(frozen=True, eq=False)
class _Split:
    """Which directions of a layer's wider side are rotated.

    Arguments:
        basis: Float[k i s], the directions; [k o s] where the outputs are more.
        other: Float[k o o], of the other side.
        turned: whether the outputs are more: both sides are exchanged then.
        near: Int64[s], the places of the directions; Float[k o s], their weights, once they are known.
    """

    basis: Tensor
    other: Tensor
    turned: bool
    near: Tensor

    @classmethod
    def of(cls, factors: LayerFactors, weights: Tensor, width: int) -> _Split | None:
        """The directions of a layer with `width` buckets; None where all are rotated."""
        first, second = factors.input_basis, factors.output_basis
        if width >= weights.numel() or first is None or second is None:
            return None
        turned = weights.shape[1] > weights.shape[2]
        own, other = (second, first) if turned else (first, second)
        if own.shape[2] < _WIDE:
            return None
        eigenvalues, weights = (_exchanged(part, turned) for part in (factors.eigenvalues, weights))
        order, fewest = near_directions(eigenvalues, weights, _SHARE)
        count = max(fewest, 1)
        if 8 * count > 3 * own.shape[2]:
            return None
        near = order[-count:]
        return cls(own[..., near].contiguous(), other, turned, near)

    def weighted(self, eigenvalues: Tensor, weights: Tensor, signs: torch.Generator) -> tuple[_Split, Tensor]:
        """With the signed weights of the directions; and Float[k o i], those of the others."""
        squares, weights = (_exchanged(part, self.turned) for part in (eigenvalues, weights))
        far = torch.ones(weights.shape[2], device=weights.device).index_fill(0, self.near, 0) * squares
        mean = (far * weights).sum(2, keepdim=True) / far.sum(2, keepdim=True).clamp(min=1e-30)
        near = _signed(weights[..., self.near], signs)
        return replace(self, near=near), mean.expand_as(weights)

    def parts(self, activations: Tensor, output_gradients: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
        """Float[c k o s] and Float[c k o i]: gradients in the directions, rotated, and outside of them."""
        inner, outer_ = (output_gradients, activations) if self.turned else (activations, output_gradients)
        positions, inputs, outputs = inner.shape[2], inner.shape[3], outer_.shape[3]
        back = self.basis.transpose(1, 2)
        if positions <= inputs:
            outer_ = times(outer_, self.other)
        if positions <= outputs:
            coordinates = times(inner, self.basis)
            near = torch.matmul(outer_.transpose(2, 3), coordinates)
            far = outer(inner - times(coordinates, back), outer_, scratch)
        else:
            far = outer(inner, outer_, scratch)
            near = times(far, self.basis)
            far -= times(near, back)
        if positions > inputs:
            near, far = (torch.matmul(self.other.transpose(1, 2), part) for part in (near, far))
        return near, far


def _exchanged(matrices: Tensor, turned: bool) -> Tensor:
    return matrices.transpose(1, 2) if turned else matrices


def _signed(root: Tensor, randomness: torch.Generator) -> Tensor:
    signs = torch.randint(2, root.shape, generator=randomness, dtype=torch.int8).mul_(2).sub_(1)
    return root * signs.to(root)


@final
class _Rows(Visitor):
    """Sums of signed entries of rotated gradients, row by row, and squared lengths in float64."""

    def __init__(self, layers: Sequence[Layer], parts: Sequence[_Part], sweeper: Sweeper) -> None:
        self.layers, self.parts, self.sweeper, self.scratch = layers, parts, sweeper, sweeper.scratch
        self.first = [sum(part.width for part in parts[:index]) for index in range(len(parts))]
        self.begin(0, 0)

    def begin(self, count: int, dimensions: int) -> None:
        """Room for a batch."""
        device, dtype = self.sweeper.device, self.sweeper.dtype
        self.rows = torch.zeros(count, dimensions, device=device, dtype=dtype)
        self.lengths, self.norms = torch.zeros(2, count, device=device, dtype=torch.float64)

    def kronecker(self, index: int, start: int, activations: Tensor, output_gradients: Tensor) -> None:
        own, split = self.parts[index].factors, self.parts[index].split
        assert own.input_basis is not None
        assert own.output_basis is not None
        if split is not None:
            near, rest = split.parts(activations, output_gradients, self.scratch)
            self._add(index, start, near, split.near, leading=True)
        else:
            rest = rotated(activations, output_gradients, own.input_basis, own.output_basis, self.scratch)
        self._add(index, start, rest, self.parts[index].roots, leading=split is None)

    def diagonal(self, index: int, start: int, gradient: Tensor) -> None:
        self._add(index, start, gradient.clone(), self.parts[index].roots, leading=True)

    def _add(self, index: int, start: int, turned: Tensor, roots: Tensor, *, leading: bool) -> None:
        """Add a layer's part, or some of it, which has the numbers to keep where `leading`; `turned` is
        overwritten."""
        width, kept, first = self.parts[index].buckets, self.parts[index].kept, self.first[index]
        rows = slice(start, start + len(turned))
        flat = turned.flatten(1)
        # A rotation keeps the length.
        self.norms[rows] += torch.linalg.vector_norm(flat, dim=1).double().square()
        start, whole = first + len(kept), flat.shape[1] // width * width
        into = self.rows[rows, start : start + width]
        if width == flat.shape[1]:
            torch.mul(flat, roots.flatten(), out=into)
            self.lengths[rows] += torch.linalg.vector_norm(into, dim=1).double().square()
            return
        flat.mul_(roots.flatten())
        self.lengths[rows] += torch.linalg.vector_norm(flat, dim=1).double().square()
        if leading and len(kept):
            self.rows[rows, first:start] = flat.index_select(1, kept)
            flat.index_fill_(1, kept, 0)
        into += flat[:, :whole].view(len(flat), -1, width).sum(1)
        if whole < flat.shape[1]:
            into[:, : flat.shape[1] - whole] += flat[:, whole:]
