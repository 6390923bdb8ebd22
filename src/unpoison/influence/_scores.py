"""`score`: the influence of every training example on every query, in one pass over the training set.

`values[m, j] = v_m^T (G + damping)^-1 grad L(z_j)`, without a leading minus. With a measurement that falls
as the query's label gets more likely (minus the margin, for classification), a POSITIVE score is a
proponent: training more on z_j raises the margin of the query's label. Poison has large positive scores for
the wrong label that it caused.

Whatever the number of queries, an example takes one forward and one backward pass without parameter
gradients, its per-example gradient of each layer (k t o i multiplications) and one product with the m
queries (m k o i), computed as a matrix product over a chunk of examples while the chunk is in cache. For a
linear layer with one position per example the gradient is never formed: g^T V a. Memory: the queries (m
numbers a parameter), the activations of one batch, `workspace_bytes`, and the scores. A query of rank r takes
m r t (o + i) or m r o i multiplications, whichever is less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn

from unpoison._progress import Progress
from unpoison.data import Examples
from unpoison.errors import InputError, MismatchError
from unpoison.influence._diagonal_layers import TableRows
from unpoison.influence._factors import model_fingerprint, rotated
from unpoison.influence._layers import Layer, outer
from unpoison.influence._products import products
from unpoison.influence._queries import LowRank, PreconditionedQueries, inverse
from unpoison.influence._shards import Shard
from unpoison.influence._sweep import Sweeper, Visitor
from unpoison.influence._tracked import tracked_layers
from unpoison.tasks import Task


@final
@dataclass(frozen=True, eq=False)
class Scores:
    """Influences of the examples `start`... on m queries, on the model's device.

    Arguments:
        values: Float[m, n]; positive = proponent.
        losses: Float[n], the loss of each example, or its measurement where that was differentiated.
        gradient_norms: Float64[n], the L2 norm of the example's gradient over the tracked parameters, if
            asked for.
        self_influence: Float64[n], g^T (G + damping)^-1 g of the example's own gradient, if asked for.
        start: the index of the first example.
    """

    values: Tensor
    losses: Tensor
    gradient_norms: Tensor | None = None
    self_influence: Tensor | None = None
    start: int = 0


def score(
    model: nn.Module,
    queries: PreconditionedQueries,
    examples: Examples,
    task: Task,
    *,
    gradient: Literal["loss", "measurement"] = "loss",
    gradient_norms: bool = False,
    self_influence: bool = False,
    start: int | None = None,
    stop: int | None = None,
    batch_size: int = 128,
    workspace_bytes: int | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Score `examples` against all `queries` in one pass.

    In a `torch.distributed` process group each process reads its share and all get all scores, unless
    `start` or `stop` say which examples this process is to do.

    Arguments:
        model: the model that the queries were made with; used in evaluation mode and left as it was.
        queries: from `precondition`.
        examples: the training set, read once in consecutive batches.
        task: its `loss` is differentiated.
        gradient: "measurement" to differentiate the task's measurement at the training examples instead, for
            scores that are divided by the length of the gradient: see `Task.measurement`.
        gradient_norms: also give the norm of each example's gradient; costs next to nothing.
        self_influence: also give each example's influence on itself; needs factors, about doubles the cost.
        start: first example, 0 by default.
        stop: one past the last example, all by default.
        batch_size: examples of a forward pass.
        workspace_bytes: of per-example gradients at a time; default 8 MiB, on CUDA 1 GiB.
        progress: called with "scores", examples done and examples to do, after each batch.

    Raises:
        MismatchError: the queries were made with another model.
        InputError: the range is empty, or self-influence is asked for without factors.
    """
    if model_fingerprint(model) != queries.model_fingerprint:
        raise MismatchError("these queries were made with another model; make them anew")
    if self_influence and queries.factors is None:
        raise InputError("score: self_influence needs queries that were preconditioned with factors")
    total = len(examples)
    shard = Shard.current() if start is None and stop is None else Shard()
    first, last = shard.bounds(total)
    first, last = first if start is None else start, last if stop is None else stop
    if not 0 <= first <= last <= total or total < 1 or batch_size < 1:
        raise InputError(
            f"score: cannot score examples {first} to {last} of {total} in batches of {batch_size}"
        )
    function = task.loss if gradient == "loss" else task.measurement
    layers = tracked_layers(model, [*queries.values, *queries.low_rank])
    with Sweeper(model, layers, workspace_bytes=workspace_bytes) as sweeper:
        visitor = _Products(layers, queries, sweeper, last - first, gradient_norms, self_influence)
        for low in range(first, last, batch_size):
            high = min(low + batch_size, last)
            visitor.first = low - first
            values = sweeper.batch(examples.batch(low, high), function, visitor)
            visitor.losses[low - first : high - first] = values
            if progress is not None:
                progress("scores", high - first, last - first)
    norms, own = visitor.squares, visitor.self_influence
    return Scores(
        shard.gather(visitor.products, total).t(),
        shard.gather(visitor.losses, total),
        None if norms is None else shard.gather(norms, total).sqrt_(),
        None if own is None else shard.gather(own, total),
        first if shard.world == 1 else 0,
    )


@final
class _Products(Visitor):
    """Products of per-example gradients with the queries, row by row."""

    def __init__(
        self,
        layers: Sequence[Layer],
        queries: PreconditionedQueries,
        sweeper: Sweeper,
        count: int,
        gradient_norms: bool,
        self_influence: bool,
    ) -> None:
        device, dtype = sweeper.device, sweeper.dtype
        self.layers, self.first, self.scratch = layers, 0, sweeper.scratch
        self.queries = [
            None if layer.name in queries.low_rank else queries.values[layer.name].to(device, dtype)
            for layer in layers
        ]
        self.low_rank = [queries.low_rank.get(layer.name) for layer in layers]
        self.workspace = sweeper.workspace
        self.products = torch.zeros(count, len(queries), device=device, dtype=dtype)
        self.losses = torch.zeros(count, device=device, dtype=dtype)
        # Squares of gradients far below 1 are kept in float64.
        squares = torch.zeros(2, count, device=device, dtype=torch.float64)
        self.squares = squares[0] if gradient_norms else None
        self.self_influence = squares[1] if self_influence else None
        self.factors = []
        if self_influence and queries.factors is not None:
            own = [queries.factors.layers[layer.name].to(device, dtype) for layer in layers]
            self.factors = [(one, inverse(one, queries.damping)) for one in own]

    def kronecker(self, index: int, start: int, activations: Tensor, output_gradients: Tensor) -> None:
        rows = slice(self.first + start, self.first + start + len(activations))
        scale = _scale(output_gradients)
        output_gradients = output_gradients / scale[:, None, None, None]
        if self.self_influence is not None:
            own, reciprocal = self.factors[index]
            assert own.input_basis is not None
            assert own.output_basis is not None
            turned = rotated(activations, output_gradients, own.input_basis, own.output_basis, self.scratch)
            self._add_self_influence(rows, turned, reciprocal, scale)
        low_rank = self.low_rank[index]
        if low_rank is not None:
            self._dot_low_rank(low_rank, rows, activations, output_gradients, scale)
            return
        queries = self.queries[index]
        assert queries is not None
        count, groups, outputs, inputs = queries.shape
        if activations.shape[2] == 1 and groups == 1 and count < inputs:
            a, g = activations[:, 0, 0], output_gradients[:, 0, 0]
            through = products(queries.view(count * outputs, inputs), a).view(count, outputs, -1)
            self.products[rows] += (through * g.t()).sum(1).t() * scale[:, None]
            if self.squares is not None:
                self.squares[rows] += a.square().sum(1) * g.square().sum(1) * scale.double().square()
            return
        self._dot(index, rows, outer(activations, output_gradients, self.scratch), scale)

    def _dot_low_rank(
        self, queries: LowRank, rows: slice, activations: Tensor, output_gradients: Tensor, scale: Tensor
    ) -> None:
        c, _, positions, inputs = activations.shape
        _, outputs, count, rank = queries.left.shape
        left, right = queries.left.flatten(2), queries.right.flatten(2)
        by_position = positions * (outputs + inputs) < outputs * inputs
        across = positions if by_position else inputs
        step = max(1, self.workspace // (2 * len(left) * across * count * rank * left.element_size()))
        found = self.products[rows]
        for start in range(0, c, step):
            part = slice(start, start + step)
            a, g, own = activations[part], output_gradients[part], scale[part]
            if self.squares is not None or not by_position:
                gradient = outer(a, g, self.scratch)
                self._add_squares(slice(rows.start + start, rows.start + start + len(a)), gradient, own)
            if by_position:
                both = torch.matmul(g, left).mul_(torch.matmul(a, right))
            else:
                both = torch.matmul(gradient.transpose(2, 3), left).mul_(right)
            sums = both.sum((1, 2)).view(len(a), count, rank).sum(2)
            found[part] += sums * own[:, None]

    def diagonal(self, index: int, start: int, gradient: Tensor) -> None:
        rows = slice(self.first + start, self.first + start + len(gradient))
        scale = _scale(gradient)
        gradient = gradient / scale[:, None, None, None]
        if self.self_influence is not None:
            self._add_self_influence(rows, gradient.clone(), self.factors[index][1], scale)
        self._dot(index, rows, gradient, scale)

    def table_rows(self, index: int, start: int, rows: TableRows) -> bool:
        """Products with the rows of the queries' tables that the examples use."""
        queries = self.queries[index]
        assert queries is not None
        owners, squares = self.first + start + rows.owners, rows.gradients.double().square()
        for place, table in enumerate(queries[:, 0]):
            self.products[:, place].index_add_(0, owners, (table[rows.places] * rows.gradients).sum(1))
        if self.squares is not None:
            self.squares.index_add_(0, owners, squares.sum(1))
        if self.self_influence is not None:
            own = (squares * self.factors[index][1][0, rows.places]).sum(1)
            self.self_influence.index_add_(0, owners, own)
        return True

    def _add_self_influence(self, rows: slice, turned: Tensor, reciprocal: Tensor, scale: Tensor) -> None:
        assert self.self_influence is not None
        own = turned.square_().flatten(1).mv(reciprocal.flatten())
        self.self_influence[rows] += own * scale.double().square()

    def _dot(self, index: int, rows: slice, gradient: Tensor, scale: Tensor) -> None:
        queries = self.queries[index]
        assert queries is not None
        self.products[rows] += products(queries.flatten(1), gradient.flatten(1)).t() * scale[:, None]
        self._add_squares(rows, gradient, scale)

    def _add_squares(self, rows: slice, gradient: Tensor, scale: Tensor) -> None:
        if self.squares is not None:
            norms = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
            self.squares[rows] += (norms * scale).double().square()


def _scale(gradients: Tensor) -> Tensor:
    """Float[b]: a power of two near the largest entry of each of Float[b ...], 1 where all are 0.

    Divided by it, gradients of examples that are fitted nearly perfectly have squares that do not underflow,
    and every other number stays what it was.
    """
    largest = gradients.flatten(1).abs().amax(1)
    exponent = torch.frexp(largest).exponent.clamp(-100, 100)  # within the range of float32
    return torch.ldexp(torch.ones_like(largest), exponent)
