"""Greedy facility location: the medoids of a cloud of points, and which points each of them serves.

`f(A) = sum_i max_{j in A} s_ij` grows with every medoid, by ever less, so the greedy choice is within
1 - 1/e of the best (Nemhauser, Wolsey and Fisher 1978), and a gain computed once stays an upper bound (Minoux
1978). EPIC takes its clusters from it. Stages:

I    merge      Points that are equal to the last bit become one that counts as many times.
II   likeness   `v_ij = s_ij - 1`, kept as float32: near 1 the similarity itself has no digits left to tell
                the points of a dense core apart, its distance from 1 has them all. The squared distances are
                one float64 product of extended points, in blocks.
III  pick       Each pick evaluates, in batches of the greatest bounds, only what the bounds do not exclude.

Exact up to rounding of equal gains; ties go to the lower index, points to the medoid picked first.

Cost for n points of dimension d and k medoids: n^2 (d + 3) operations for II, and some 7 n rows of n for III,
where all bounds at the start would be k n rows. Memory: 4 n^2 bytes where that is within the setting; beyond
it rows are computed when they are needed, several times over, in blocks within the setting.

On an accelerator every gain is computed anew at every pick, from the stored matrix: k n^2 operations, but
nothing is read back before the last pick.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, final

import torch
from torch import Tensor

from unpoison.errors import InputError

Kernel = Literal["exponential", "distance"]

KERNELS: Final = ("exponential", "distance")
MEMORY: Final = 256 * 2**20
# Rows of the matrix that are worked on at once: so few that a block of float64 stays in the cache.
_BLOCK_BYTES: Final = 2**21
_FIRST_BATCH, _LAST_BATCH = 16, 256


@final
@dataclass(frozen=True, eq=False)
class Clusters:
    """What the greedy choice gave.

    Arguments:
        medoids: Int64[k], the points picked, in the order of the picks. Fewer than were asked for where there
            are no more different points: another pick would serve nobody.
        owner: Int64[n], for each point the place in `medoids` of the one that serves it.
    """

    medoids: Tensor
    owner: Tensor

    @property
    def sizes(self) -> Tensor:
        """Int64[k]: how many points each medoid serves, itself included."""
        return torch.bincount(self.owner, minlength=len(self.medoids))

    @property
    def size_of_each(self) -> Tensor:
        """Int64[n]: how many points the cluster of each point has."""
        return self.sizes[self.owner]


class Workspace:
    """The memory of one matrix, used again for every class: fresh pages cost as much as filling them."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def matrix(self, rows: int, device: torch.device) -> Tensor:
        """Float32[rows rows], of whatever content."""
        if self._buffer is None or self._buffer.device != device or len(self._buffer) < rows * rows:
            self._buffer = None  # before the next is allocated
            self._buffer = torch.empty(rows * rows, dtype=torch.float32, device=device)
        return self._buffer[: rows * rows].view(rows, rows)


def greedy_medoids(
    points: Tensor,
    count: int,
    *,
    kernel: Kernel = "exponential",
    memory: int = MEMORY,
    workspace: Workspace | None = None,
) -> Clusters:
    """Pick `count` medoids greedily and assign every point to the most similar of them.

    Arguments:
        points: Float[n d], on any device.
        count: how many, 0 or more. 0 leaves every point without an owner (-1).
        kernel: "exponential", `s_ij = exp(-|x_i - x_j| / d)` with the Euclidean distance, as submodlib has
            it; or "distance", `s_ij = -|x_i - x_j|`, with which this is the greedy start of k-medoids.
        memory: bytes that the matrix of similarities may take.
        workspace: memory to use again, for who calls this for many classes.

    Raises:
        InputError: points that are not a finite matrix of numbers.
    """
    if points.ndim != 2 or not points.is_floating_point():
        raise InputError(
            f"points: expected a float matrix [n d], found {points.dtype} of shape {tuple(points.shape)}"
        )
    if not bool(torch.isfinite(points).all()):
        raise InputError("points: hold values that are not finite; distances to them mean nothing")
    if count <= 0 or not len(points):
        nobody = torch.empty(0, dtype=torch.int64, device=points.device)
        return Clusters(nobody, torch.full((len(points),), -1, dtype=torch.int64, device=points.device))
    distinct, first, group, weights = _merged(points.double())
    likeness = _Likeness(distinct, kernel, memory, workspace)
    count = min(count, len(distinct))
    # Merged points are numbered by their first occurrence, so that the lower number is the lower index.
    choose = _picked_without_looking if likeness.stored and points.is_cuda else _picked_lazily
    order, owner = choose(likeness, weights, count)
    return Clusters(first[order], owner[group])


def _merged(points: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The different points, where each occurs first, which one each point is, and how often it occurs."""
    values, inverse, counts = torch.unique(points + 0.0, dim=0, return_inverse=True, return_counts=True)
    places = torch.arange(len(points), device=points.device)
    first = torch.full((len(values),), len(points), dtype=torch.int64, device=points.device)
    first.scatter_reduce_(0, inverse, places, "amin")
    order = first.argsort()
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=points.device)
    first = first[order]
    return points[first], first, rank[inverse], counts[order].float()


class _Likeness:
    """Rows of `s - 1` (exponential) or `s` (distance), stored or computed when they are asked for."""

    def __init__(self, points: Tensor, kernel: Kernel, memory: int, workspace: Workspace | None) -> None:
        n, d = points.shape
        self.count, self.device, self.kernel, self.memory = n, points.device, kernel, memory
        if kernel == "exponential":
            points = points / d
        squares = points.square().sum(1, keepdim=True)
        ones = torch.ones_like(squares)
        # |x - y|^2 = -2 x.y + |x|^2 1 + 1 |y|^2 as one product of length d + 2.
        self.left = torch.cat([-2 * points, squares, ones], 1)
        self.right = torch.cat([points, ones, squares], 1).T.contiguous()
        # No likeness is less than that of the two ends of a diameter of the ball around the mean.
        diameter = 2 * float((points - points.mean(0)).norm(dim=1).max())
        self.least = -1.0 if kernel == "exponential" else -diameter
        self.matrix: Tensor | None = None
        if 4 * n * n <= memory:
            self.matrix = (workspace or Workspace()).matrix(n, self.device)

    @property
    def stored(self) -> bool:
        return self.matrix is not None

    def _compute(self, rows: Tensor, out: Tensor) -> Tensor:
        squared = self.left[rows] @ self.right
        torch.sqrt(squared.clamp_min_(0).float(), out=out)
        out.neg_()
        if self.kernel == "exponential":
            out.expm1_()
        # A point is as like itself as can be; rounding must not say otherwise.
        out[torch.arange(len(rows), device=self.device), rows] = 0.0
        return out

    def rows(self, chosen: Tensor) -> Tensor:
        """Float32[m n], the caller's to overwrite."""
        if self.matrix is not None:
            return self.matrix.index_select(0, chosen)
        return self._compute(chosen, torch.empty(len(chosen), self.count, device=self.device))

    def first_gains(self, weights: Tensor) -> Tensor:
        """Float64[n]: what each point would gain as the only medoid; fills the matrix."""
        gains = torch.empty(self.count, dtype=torch.float64, device=self.device)
        every = torch.arange(self.count, device=self.device)
        step = max(1, _BLOCK_BYTES // (8 * self.count))
        scratch = torch.empty(step, self.count, device=self.device)
        total = float(weights.double().sum())
        for rows in every.split(step):
            start, stop = int(rows[0]), int(rows[0]) + len(rows)
            out = scratch[: len(rows)] if self.matrix is None else self.matrix[start:stop]
            gains[start:stop] = (self._compute(rows, out) @ weights).double() - self.least * total
        return gains

    def batch(self, wanted: int) -> int:
        """How many rows may be evaluated at once."""
        spare = self.memory // 4 if self.matrix is None else 4 * _BLOCK_BYTES
        return max(1, min(wanted, spare // (16 * self.count) if self.matrix is None else wanted))


def _picked_lazily(likeness: _Likeness, weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Medoids in order, and the place of each point's in it, by bounds that are renewed when they matter."""
    device, n = likeness.device, likeness.count
    bounds = likeness.first_gains(weights).cpu().numpy()
    fresh = bounds > -1.0  # all of them
    served = torch.full((n,), likeness.least, device=device)
    owner = torch.zeros(n, dtype=torch.int64, device=device)
    order: list[int] = []
    for pick in range(count):
        wanted = _FIRST_BATCH
        # The first of equal bounds: where it is fresh, whoever might equal it has a higher index.
        while not fresh[best := int(bounds.argmax())]:
            stale = (~fresh).nonzero()[0]
            # Only those that might yet be picked, and of these the likeliest.
            stale = stale[bounds[stale] >= bounds[fresh].max(initial=0.0)]
            size = likeness.batch(wanted)
            if len(stale) > size:
                stale = stale[bounds[stale].argpartition(len(stale) - size)[-size:]]
            rows = likeness.rows(torch.from_numpy(stale).to(device))
            gains = rows.sub_(served).clamp_min_(0).mv(weights)
            bounds[stale] = gains.double().cpu().numpy()
            fresh[stale] = True
            wanted = min(2 * wanted, _LAST_BATCH)
        order.append(best)
        row = likeness.rows(torch.tensor([best], device=device))[0]
        better = row > served
        owner[better] = pick
        served = torch.maximum(served, row)
        # A point that gains nothing never will; one picked already is not picked again.
        fresh = bounds <= 0
        bounds[best], fresh[best] = -1.0, True
    return torch.tensor(order, device=device), owner


def _picked_without_looking(likeness: _Likeness, weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The same by all gains at every pick, with nothing read back from the device."""
    gains = likeness.first_gains(weights)
    assert likeness.matrix is not None
    device, n = likeness.device, likeness.count
    served = torch.full((n,), likeness.least, device=device)
    owner = torch.zeros(n, dtype=torch.int64, device=device)
    order = torch.zeros(count, dtype=torch.int64, device=device)
    places = torch.arange(n, device=device)
    taken = torch.zeros(n, dtype=torch.bool, device=device)
    step = max(1, min(n, (64 * 2**20) // (4 * n)))
    for pick in range(count):
        if pick:
            gains = torch.cat(
                [(rows - served).clamp_min_(0).mv(weights) for rows in likeness.matrix.split(step)]
            ).double()
        gains = gains.masked_fill(taken, -1.0)
        best = torch.where(gains == gains.max(), places, n).amin()
        order[pick] = best
        taken[best] = True
        row = likeness.matrix.index_select(0, best[None])[0]
        owner = torch.where(row > served, pick, owner)
        served = torch.maximum(served, row)
    return order, owner
