"""`precondition`: queries, multiplied by the inverse curvature, ready for products with training gradients.

A query is a linear combination of measurement gradients, `v = sum_q C[m, q] grad m(x_q, y_q)`, formed before
anything else: the difference of two queries with large common parts loses nothing to rounding, and n
differences cost n products, not 2n. It is then multiplied by the inverse curvature, layer by layer:
`P v = Qg ((Qg^T V Qa) / (Lambda + damping)) Qa^T`.

Cost: a forward and a backward pass of the q measured inputs, and 2 m k o i (o + i) multiplications a layer.
Memory: m numbers for each tracked parameter. Where that is too much, `influence_scores` takes the modules in
blocks, or a rank: a query of a layer is then the product of two matrices, `m r k (o + i)` numbers, by a
randomised singular value decomposition (Halko, Martinsson and Tropp, 2011), as kronfluence's
`query_gradient_low_rank` does (Grosse et al., 2023, section 3.2).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, final

import torch
from torch import Tensor, nn

from unpoison._inputs import count_of, rows_of
from unpoison._memory import check_memory
from unpoison._progress import Progress
from unpoison.errors import InputError
from unpoison.influence._diagonal_layers import TableRows
from unpoison.influence._factors import Factors, LayerFactors, model_fingerprint, rotated_matrix
from unpoison.influence._layers import Layer, outer
from unpoison.influence._sweep import Sweeper, Visitor, where
from unpoison.influence._tracked import tracked_layers
from unpoison.models import usual_mode
from unpoison.tasks import Batch, Task

QUERY_SHARE: Final = 0.5
"""The share of the memory that queries in blocks may take; the rest is for activations and gradients."""
QUERY_SLICE: Final = 64 << 20
"""Bytes of queries that are preconditioned at a time."""


class Damping(ABC):
    """What is added to the eigenvalues before they are inverted."""

    @abstractmethod
    def of(self, eigenvalues: Tensor) -> Tensor:
        """A scalar for a layer with these eigenvalues."""


@final
@dataclass(frozen=True)
class AbsoluteDamping(Damping):
    """The same number for every layer. 1e-8 is what the published experiments of Delta-Influence used."""

    value: float = 1e-8

    def __post_init__(self) -> None:
        if not self.value >= 0:
            raise InputError(f"AbsoluteDamping: must be at least 0, found {self.value}")

    def of(self, eigenvalues: Tensor) -> Tensor:
        """The value."""
        return eigenvalues.new_tensor(self.value)


@final
@dataclass(frozen=True)
class RelativeDamping(Damping):
    """A share of the layer's mean eigenvalue; 0.1 is the rule of thumb of Grosse et al., 2023."""

    share: float = 0.1

    def __post_init__(self) -> None:
        if not self.share >= 0:
            raise InputError(f"RelativeDamping: must be at least 0, found {self.share}")

    def of(self, eigenvalues: Tensor) -> Tensor:
        """The share of the mean."""
        return self.share * eigenvalues.mean()


def inverse(factors: LayerFactors, damping: Damping) -> Tensor:
    """Float[k o i]: 1 / (Lambda + damping), and 0 where that sum is 0 (no example has a gradient there)."""
    damped = factors.eigenvalues + damping.of(factors.eigenvalues)
    return torch.where(damped > 0, damped.reciprocal(), damped.new_zeros(()))


@final
@dataclass(frozen=True, eq=False)
class LowRank:
    """m matrices of rank r a group, `sum_r left[k, :, m, r] right[k, :, m, r]^T`.

    Arguments:
        left: Float[k o m r].
        right: Float[k i m r].
    """

    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, matrices: Tensor, rank: int, randomness: torch.Generator) -> LowRank:
        """The leading singular directions of Float[m k o i], nearly: two power iterations."""
        width = min(rank + 8, *matrices.shape[2:])
        start = torch.randn(matrices.shape[3], width, generator=randomness).to(matrices)
        basis = torch.linalg.qr(matrices @ start)[0]
        for _ in range(2):
            basis = torch.linalg.qr(matrices @ torch.linalg.qr(matrices.transpose(2, 3) @ basis)[0])[0]
        inner = basis.transpose(2, 3) @ matrices
        directions = torch.linalg.eigh(inner @ inner.transpose(2, 3))[1][..., -rank:]
        left, right = basis @ directions, inner.transpose(2, 3) @ directions
        return cls(left.permute(1, 2, 0, 3).contiguous(), right.permute(1, 2, 0, 3).contiguous())


@final
@dataclass(frozen=True, eq=False)
class PreconditionedQueries:
    """Queries after the inverse curvature, by module name: Float[m k o i], laid out as in `Factors`.

    Arguments:
        values: the queries.
        factors: what they were preconditioned with; None for plain gradients (the identity as curvature).
        damping: the damping used.
        model_fingerprint: of the model whose gradients they are.
        low_rank: queries that are kept as products, by module name; they are not in `values`.
    """

    values: Mapping[str, Tensor]
    factors: Factors | None
    damping: Damping
    model_fingerprint: str
    low_rank: Mapping[str, LowRank] = field(default_factory=dict)

    def __len__(self) -> int:
        exact = next(iter(self.values.values()), None)
        return next(iter(self.low_rank.values())).left.shape[2] if exact is None else len(exact)

    def by_parameter(self, model: nn.Module) -> dict[str, Tensor]:
        """`{parameter name: Float[m, *parameter.shape]}`, e.g. for a Jacobian-vector product."""
        result: dict[str, Tensor] = {}
        for layer in tracked_layers(model, list(self.values)):
            result |= layer.by_parameter(self.values[layer.name])
        return result


def precondition(
    model: nn.Module,
    factors: Factors | None,
    queries: Batch,
    task: Task,
    *,
    combine: Tensor | None = None,
    damping: Damping | None = None,
    modules: object = None,
    batch_size: int = 128,
    workspace_bytes: int | None = None,
    progress: Progress | None = None,
) -> PreconditionedQueries:
    """Measurement gradients of `queries`, combined and multiplied by the inverse curvature.

    Arguments:
        model: the model that the factors were fitted to.
        factors: from `fit_factors`; None for plain gradients, without curvature.
        queries: a batch of q examples, as `task.measurement` takes them.
        task: its `measurement` is differentiated.
        combine: Float[m, q], the combinations to form; the identity by default.
        damping: `RelativeDamping()` by default.
        modules: which modules to track, as for `fit_factors`; all that have factors by default.
        batch_size: queries of a forward pass.
        workspace_bytes: of per-example gradients at a time.
        progress: called with "queries", queries done and queries to do, after each batch.

    Raises:
        MismatchError: the factors were fitted to another model.
        InsufficientMemoryError: the queries take more memory than may be taken.
    """
    damping = RelativeDamping() if damping is None else damping
    if factors is not None:
        factors.check(model)
    layers = tracked_layers(
        model, list(factors.layers) if factors is not None and modules is None else modules
    )
    count = count_of(queries[0])
    if combine is None:
        combine = torch.eye(count)
    if combine.ndim != 2 or combine.shape[1] != count or not count:
        raise InputError(
            f"combine: must be of shape [m, {count}] for {count} queries, found {list(combine.shape)}"
        )
    device, dtype = where(model)
    held = len(combine) * sum(math.prod(layer.shape) for layer in layers) * dtype.itemsize
    check_memory(
        "queries",
        {f"{len(combine)} queries": held},
        advice=lambda allowed: (
            f"{len(combine) * allowed // held} fit at a time; `influence_scores` takes blocks of modules"
        ),
        device=device,
    )
    with Sweeper(model, layers, workspace_bytes=workspace_bytes) as sweeper:
        collected = _Combined(layers, combine.to(sweeper.device, sweeper.dtype), sweeper)
        for start in range(0, count, batch_size):
            collected.first = start
            sweeper.batch(
                tuple(rows_of(part, slice(start, start + batch_size)) for part in queries),
                task.measurement,
                collected,
            )
            if progress is not None:
                progress("queries", min(start + batch_size, count), count)
        reached = sweeper.reached
    values: dict[str, Tensor] = {}
    with usual_mode(device):
        for index, layer in enumerate(layers):
            total = collected.totals[index]
            if factors is None:
                if reached[index]:
                    values[layer.name] = total
                continue
            own = factors.layers[layer.name].to(device, dtype)
            if own.input_basis is None or own.output_basis is None:
                values[layer.name] = total.mul_(inverse(own, damping))
            else:
                step, damped = max(1, QUERY_SLICE // total[0].nbytes), inverse(own, damping)
                for start in range(0, len(total), step):  # in place, since most of the memory is here
                    rows = total[start : start + step]
                    rows.copy_(_preconditioned(rows, own.input_basis, own.output_basis, damped))
                values[layer.name] = total
    return PreconditionedQueries(values, factors, damping, model_fingerprint(model))


def _preconditioned(vectors: Tensor, input_basis: Tensor, output_basis: Tensor, inverse: Tensor) -> Tensor:
    inner = rotated_matrix(vectors, input_basis, output_basis).mul_(inverse)
    return rotated_matrix(inner, input_basis.transpose(1, 2), output_basis.transpose(1, 2))


@final
class _Combined(Visitor):
    """Combinations of per-example gradients, Float[m k o i] a layer."""

    def __init__(self, layers: list[Layer], combine: Tensor, sweeper: Sweeper) -> None:
        self.combine, self.first, self.scratch = combine, 0, sweeper.scratch
        self.totals = [
            torch.zeros(len(combine), *layer.shape, device=sweeper.device, dtype=sweeper.dtype)
            for layer in layers
        ]

    def kronecker(self, index: int, start: int, activations: Tensor, output_gradients: Tensor) -> None:
        self.diagonal(index, start, outer(activations, output_gradients, self.scratch))

    def diagonal(self, index: int, start: int, gradient: Tensor) -> None:
        first = self.first + start
        part = self.combine[:, first : first + len(gradient)]
        # Of many combinations of a few queries each, only those of these queries change.
        rows = part.any(1).nonzero()[:, 0]
        self.totals[index].flatten(1).index_add_(0, rows, part[rows] @ gradient.flatten(1))

    def table_rows(self, index: int, start: int, rows: TableRows) -> bool:
        """Combinations of the rows that the examples use."""
        shares = self.combine[:, self.first + start + rows.owners]
        for total, share in zip(self.totals[index][:, 0], shares, strict=True):
            used = share.nonzero()[:, 0]
            total.index_add_(0, rows.places[used], share[used, None] * rows.gradients[used])
        return True
