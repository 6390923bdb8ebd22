"""`Sketcher`: per-example gradients in the metric of the inverse curvature, sketched as they are formed.

For a layer with EK-FAC factors Q_a, Q_g, Lambda and the gradient G_j of example j,

    W_j = (Q_g^T G_j Q_a) / sqrt(Lambda + damping),

so that <W_j, W_k>, summed over the layers, is the influence of j on k. It is sketched to D numbers. A layer
of p numbers gets a share D_l of them in proportion to its expected |W|^2, which makes the error of an inner
product least, and at most p: layers that are small are kept as they are. In the others the numbers get random
signs, and those whose places are equal modulo D_l are added up: a count sketch (Charikar, Chen and
Farach-Colton, 2002) with buckets of equal size, D_l being prime to the length of a row of W, so that no
bucket is a column. Inner products are kept on average, with a deviation of about |W_j| |W_k| / sqrt(D).
|W_j| and |G_j| are exact.

Cost: an example takes one forward and one backward pass without parameter gradients and, beside its gradient,
one rotation of it into the eigenbasis (as in the second pass of `fit_factors`) and p additions. Memory: n D
numbers, 4 bytes a tracked parameter, the factors, the activations of one batch, and twice `workspace_bytes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from unpoison._seeds import generator
from unpoison.influence._factors import Factors, LayerFactors, rotated
from unpoison.influence._layers import Layer
from unpoison.influence._queries import Damping, inverse
from unpoison.influence._sweep import Sweeper, Visitor
from unpoison.influence._tracked import tracked_layers
from unpoison.tasks import Batch


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
    [1, 99]
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
                chosen[index] = _prime_to(max(1, int(shares[index])), layers[index].eigenvalues.shape[2])
            break
        for index in whole:
            chosen[index] = sizes[index]
            left -= sizes[index]
        open_ -= whole
    return chosen


def _prime_to(width: int, row: int) -> int:
    """The largest number up to `width` that has no factor in common with `row`."""
    return next(number for number in range(width, 0, -1) if math.gcd(number, row) == 1)


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
    ) -> None:
        layers = tracked_layers(model, list(factors.layers))
        self._function = function
        self._sweeper = Sweeper(model, layers, workspace_bytes=workspace_bytes)
        device, dtype = self._sweeper.device, self._sweeper.dtype
        sizes = widths(factors, damping, dimensions)
        parts = []
        for layer, width in zip(layers, sizes, strict=True):
            own = factors.layers[layer.name].to(device, dtype)
            root = inverse(own, damping).sqrt()
            if reweighted is not None:
                root = torch.where(root > 0, inverse(own, reweighted) / root, root)
            parts.append(_Part(own, _signed(root, width, seed, layer), width))
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
    """A layer: its factors, Float[k o i] signs over sqrt(Lambda + damping), and its number of buckets."""

    factors: LayerFactors
    roots: Tensor
    width: int


def _signed(root: Tensor, width: int, seed: int, layer: Layer) -> Tensor:
    if width >= root.numel():
        return root
    randomness = generator(seed, "sketch", layer.name)
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
        own = self.parts[index].factors
        assert own.input_basis is not None
        assert own.output_basis is not None
        turned = rotated(activations, output_gradients, own.input_basis, own.output_basis, self.scratch)
        self._add(index, start, turned)

    def diagonal(self, index: int, start: int, gradient: Tensor) -> None:
        self._add(index, start, gradient.clone())

    def _add(self, index: int, start: int, turned: Tensor) -> None:
        """Add a layer's part; `turned` is overwritten."""
        part, width, first = self.parts[index], self.parts[index].width, self.first[index]
        rows = slice(start, start + len(turned))
        flat = turned.flatten(1)
        # A rotation keeps the length.
        self.norms[rows] += torch.linalg.vector_norm(flat, dim=1).double().square()
        flat.mul_(part.roots.flatten())
        self.lengths[rows] += torch.linalg.vector_norm(flat, dim=1).double().square()
        into, whole = self.rows[rows, first : first + width], flat.shape[1] // width * width
        into += flat[:, :whole].view(len(flat), -1, width).sum(1)
        if whole < flat.shape[1]:
            into[:, : flat.shape[1] - whole] += flat[:, whole:]
