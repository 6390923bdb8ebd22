"""`project`: per-example gradients, projected to few dimensions as they are formed.

The gradient of example j over all tracked parameters, Float[p], is multiplied by one random sparse matrix
Float[d, p] with a single entry +1 or -1 in each column: the count-sketch of Charikar, Chen and
Farach-Colton (2002), which keeps inner products on average and up to a deviation of about |x| |y| /
sqrt(d), as a dense Gaussian matrix does. Its buckets are filled evenly: parameters are put in random order,
given random signs, and every d-th is added up. The gradients of a layer are projected chunk by chunk, so
[n, p] is never held in memory; as each parameter is read once, a projection costs p additions an example
where a dense matrix costs d p multiplications.

Cost: an example takes one forward and one backward pass without parameter gradients, t k o i
multiplications a layer for its gradient, and p additions. Memory: the projections, n d numbers; 12 bytes a
tracked parameter; the activations of one batch; and twice `workspace_bytes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from unpoison._progress import Progress
from unpoison._seeds import generator
from unpoison.data import Examples
from unpoison.errors import InputError
from unpoison.influence._layers import Layer, outer
from unpoison.influence._sweep import Sweeper, Visitor
from unpoison.influence._tracked import tracked_layers
from unpoison.tasks import Batch


@final
@dataclass(frozen=True, eq=False)
class Projected:
    """Projected gradients of n examples, on the model's device.

    Arguments:
        gradients: Float[n d].
        values: Float[n], the function whose gradients they are.
        layers: the tracked layers that a gradient reached; see `coverage`.
    """

    gradients: Tensor
    values: Tensor
    layers: tuple[str, ...] = ()


def project(
    model: nn.Module,
    examples: Examples,
    function: Callable[[nn.Module, Batch], Tensor],
    *,
    dimensions: int,
    seed: int,
    modules: Sequence[str] | None = None,
    batch_size: int = 128,
    workspace_bytes: int | None = None,
    progress: Progress | None = None,
) -> Projected:
    """Project the gradient of `function` at every example to `dimensions` numbers, in one pass.

    With the same model, `dimensions`, `seed` and `modules` the projection is the same, so that gradients of
    different examples and functions can be compared.

    Arguments:
        model: any module; used in evaluation mode and left as it was.
        examples: read once in consecutive batches.
        function: of the model and a batch, e.g. `task.measurement`; one number an example.
        dimensions: d.
        seed: of the projection.
        modules: whose parameters to track; as for `fit_factors`.
        batch_size: examples of a forward pass.
        workspace_bytes: of per-example gradients at a time; default 8 MiB, on CUDA 1 GiB.
        progress: called with "projections", examples done and examples to do, after each batch.

    Raises:
        InputError: there are no examples, a module cannot be tracked, or `dimensions` is not positive.
    """
    count = len(examples)
    if not count or dimensions < 1 or batch_size < 1:
        raise InputError(
            f"project: cannot project {count} examples to {dimensions} numbers in batches of {batch_size}"
        )
    layers = tracked_layers(model, modules)
    with Sweeper(model, layers, workspace_bytes=workspace_bytes) as sweeper:
        visitor = _Sketch(layers, sweeper, count, dimensions, seed)
        values = torch.zeros(count, device=sweeper.device, dtype=sweeper.dtype)
        for low in range(0, count, batch_size):
            high = min(low + batch_size, count)
            visitor.first = low
            values[low:high] = sweeper.batch(examples.batch(low, high), function, visitor)
            if progress is not None:
                progress("projections", high, count)
        reached = tuple(layer.name for layer, met in zip(layers, sweeper.reached, strict=True) if met)
    return Projected(visitor.projections, values, reached)


def count_sketch(parameters: int, dimensions: int, randomness: torch.Generator) -> tuple[Tensor, Tensor]:
    """Int64[m d] places and Float[m d] signs: parameter `places[s]` with its sign goes to bucket s % d.

    Where d does not divide the number of parameters, some places are idle and have sign 0.

    >>> places, signs = count_sketch(5, 3, torch.Generator().manual_seed(0))
    >>> sorted(places[signs != 0].tolist())
    [0, 1, 2, 3, 4]
    """
    slots = math.ceil(parameters / dimensions) * dimensions
    places = torch.randperm(slots, generator=randomness)
    signs = torch.randint(2, (slots,), generator=randomness).mul_(2).sub_(1).float()
    idle = places >= parameters
    return places.masked_fill_(idle, 0), signs.masked_fill_(idle, 0)


@final
class _Sketch(Visitor):
    """Sums of signed entries of per-example gradients, row by row."""

    def __init__(
        self, layers: Sequence[Layer], sweeper: Sweeper, count: int, dimensions: int, seed: int
    ) -> None:
        self.first, self.scratch, self.dimensions = 0, sweeper.scratch, dimensions
        self.projections = torch.zeros(count, dimensions, device=sweeper.device, dtype=sweeper.dtype)
        self.sketches = []
        for layer in layers:
            randomness = generator(seed, "projection", layer.name)
            places, signs = count_sketch(math.prod(layer.shape), dimensions, randomness)
            self.sketches.append((places.to(sweeper.device), signs.to(sweeper.device, sweeper.dtype)))

    def kronecker(self, index: int, start: int, activations: Tensor, output_gradients: Tensor) -> None:
        self.diagonal(index, start, outer(activations, output_gradients, self.scratch))

    def diagonal(self, index: int, start: int, gradient: Tensor) -> None:
        places, signs = self.sketches[index]
        flat = gradient.flatten(1)
        ordered = self.scratch.take("ordered", (len(flat), len(places)), flat)
        torch.index_select(flat, 1, places, out=ordered)
        # Every d-th entry with its sign, added up.
        rows = slice(self.first + start, self.first + start + len(flat))
        parts = ordered.mul_(signs).view(len(flat), -1, self.dimensions)
        self.projections[rows] += parts.sum(1)
