"""Greedy facility location: medoids of a set of points, and the cluster of each medoid.

`f(A) = sum_i max_{j in A} s_ij` is monotone and submodular, so the greedy choice is within 1 - 1/e of the
optimum (Nemhauser, Wolsey and Fisher 1978), and a gain once computed remains an upper bound (lazy greedy,
Minoux 1978). EPIC takes its clusters from it. Stages:

I    merge       Equal points become one point with a weight.
II   similarity  `v_ij = s_ij - 1`, stored as float32, since float32 cannot resolve similarities near 1. The
                 squared distances are one float64 product of extended points, in blocks.
III  pick        Each pick evaluates, in batches of the greatest bounds, only the points that the bounds do
                 not exclude.

Exact up to rounding of equal gains; ties go to the lower index, points to the medoid picked first.

Cost for n points of dimension d and k medoids: n^2 (d + 3) operations for II, half as many where the matrix
is stored, since it is symmetric; for III evaluations of 3n to 6n rows of length n, in place of kn. Memory: 4
n^2 bytes where the setting allows it; otherwise rows are computed when needed, several times over, in blocks.

On an accelerator every gain is computed at every pick, from the stored matrix: k n^2 operations, but nothing
is read back between picks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal, final

import numpy as np
import torch
from torch import Tensor

from unpoison.errors import InputError

Kernel = Literal["exponential", "distance"]

MEMORY: Final = 256 * 2**20
# Rows of the matrix that are computed at once, few enough for a block of float64 to stay in the cache.
_BLOCK_BYTES: Final = 2**21
_FIRST_BATCH: Final = 16
_LAST_BATCH: Final = 256
# Bounds that are examined in every pick.
_HEAD: Final = 512


@final
@dataclass(frozen=True, eq=False)
class Clusters:
    """The result of the greedy choice.

    Arguments:
        medoids: Int64[k], the points picked, in the order of the picks; fewer than `count` where there are
            fewer different points.
        owner: Int64[n], for each point the position in `medoids` of its own medoid.
    """

    medoids: Tensor
    owner: Tensor

    @property
    def sizes(self) -> Tensor:
        """Int64[k]: how many points the cluster of each medoid has, itself included."""
        return torch.bincount(self.owner, minlength=len(self.medoids))

    @property
    def size_of_each(self) -> Tensor:
        """Int64[n]: how many points the cluster of each point has."""
        return self.sizes[self.owner]


class Workspace:
    """The memory of one matrix, reused for every class: new pages cost as much as filling them."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def matrix(self, rows: int, device: torch.device) -> Tensor:
        """Float32[rows rows], uninitialised."""
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
        count: how many, 0 or more. With 0 the owner of every point is -1.
        kernel: "exponential", `s_ij = exp(-|x_i - x_j| / d)` with the Euclidean distance, as submodlib has
            it; or "distance", `s_ij = -|x_i - x_j|`, with which this is the greedy start of k-medoids.
        memory: bytes that the matrix of similarities may take.
        workspace: memory to reuse over many calls.

    Raises:
        InputError: points that are not a finite matrix of numbers.
    """
    if points.ndim != 2 or not points.is_floating_point():
        raise InputError(
            f"points: expected a float matrix [n d], found {points.dtype} of shape {tuple(points.shape)}"
        )
    if not bool(torch.isfinite(points).all()):
        raise InputError("points: some values are not finite")
    if count <= 0 or not len(points):
        nothing = torch.empty(0, dtype=torch.int64, device=points.device)
        return Clusters(nothing, torch.full((len(points),), -1, dtype=torch.int64, device=points.device))
    distinct, first, group, weights = _merged(points.double())
    similarity = _Similarity(distinct, kernel, memory, workspace)
    count = min(count, len(distinct))
    # Merged points are numbered by their first occurrence, so that the lower number is the lower index.
    choose = _pick_all_gains if similarity.stored and points.device.type != "cpu" else _pick_lazily
    order, owner = choose(similarity, weights, count)
    return Clusters(first[order], owner[group])


def _merged(points: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The different points, where each first occurs, the group of each point, and weights."""
    values, inverse, counts = torch.unique(points + 0.0, dim=0, return_inverse=True, return_counts=True)
    places = torch.arange(len(points), device=points.device)
    first = torch.full((len(values),), len(points), dtype=torch.int64, device=points.device)
    first.scatter_reduce_(0, inverse, places, "amin")
    order = first.argsort()
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=points.device)
    first = first[order]
    return points[first], first, rank[inverse], counts[order].float()


class _Similarity:
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
        # A bound: no two points are farther apart than the diameter of the ball around the mean.
        diameter = 2 * float((points - points.mean(0)).norm(dim=1).max())
        self.least = -1.0 if kernel == "exponential" else -diameter
        self._scratch: Tensor | None = None
        self.matrix: Tensor | None = None
        if 4 * n * n <= memory:
            self.matrix = (workspace or Workspace()).matrix(n, self.device)

    @property
    def stored(self) -> bool:
        return self.matrix is not None

    def _compute(self, rows: Tensor, out: Tensor) -> Tensor:
        self._similarities(self.left[rows] @ self.right, out)
        # Exactly, in spite of rounding.
        out[torch.arange(len(rows), device=self.device), rows] = 0.0
        return out

    def _similarities(self, squared: Tensor, out: Tensor) -> None:
        torch.sqrt(squared.clamp_min_(0).float(), out=out)
        out.neg_()
        if self.kernel == "exponential":
            out.expm1_()

    def _fill(self, matrix: Tensor, start: int, stop: int, scratch: Tensor) -> Tensor:
        """Rows `start` to `stop` of the matrix; columns before `start` are filled already, by symmetry."""
        own = scratch.view(-1)[: (stop - start) * (self.count - start)].view(stop - start, -1)
        self._similarities(self.left[start:stop] @ self.right[:, start:], own)
        own.fill_diagonal_(0.0)
        matrix[start:stop, start:] = own
        matrix[stop:, start:stop] = own[:, stop - start :].T
        return matrix[start:stop]

    def rows(self, chosen: Tensor) -> Tensor:
        """Float32[m n], computed anew."""
        return self._compute(chosen, torch.empty(len(chosen), self.count, device=self.device))

    def first_gains(self, weights: Tensor) -> Tensor:
        """Float64[n]: the gain of each point as the only medoid; fills the matrix."""
        gains = torch.empty(self.count, dtype=torch.float64, device=self.device)
        step = max(1, _BLOCK_BYTES // (8 * self.count))
        scratch = torch.empty(step, self.count, device=self.device)
        total = float(weights.double().sum())
        for start in range(0, self.count, step):
            stop = min(start + step, self.count)
            if self.matrix is None:
                rows = torch.arange(start, stop, device=self.device)
                found = self._compute(rows, scratch[: stop - start])
            else:
                found = self._fill(self.matrix, start, stop, scratch)
            gains[start:stop] = (found @ weights).double() - self.least * total
        return gains

    def row(self, chosen: int) -> Tensor:
        """Float32[n], not to be written to."""
        if self.matrix is not None:
            return self.matrix[chosen]
        return self.rows(torch.tensor([chosen], device=self.device))[0]

    def gains(self, chosen: Tensor, served: Tensor, weights: Tensor) -> Tensor:
        """Float32[m]: the gain of each chosen point, given the best similarity so far of all points."""
        if self.matrix is None:
            return self.rows(chosen).sub_(served).clamp_min_(0).mv(weights)
        if self._scratch is None or len(self._scratch) < len(chosen):
            self._scratch = torch.empty(max(len(chosen), _LAST_BATCH), self.count, device=self.device)
        rows = torch.index_select(self.matrix, 0, chosen, out=self._scratch[: len(chosen)])
        return rows.sub_(served).clamp_min_(0).mv(weights)

    def all_gains(self, served: Tensor, weights: Tensor) -> Tensor:
        """Float32[n]: likewise, of every point."""
        step = max(1, _BLOCK_BYTES // (8 * self.count))
        every = torch.arange(self.count, device=self.device)
        if self.matrix is None:
            return torch.cat([self.gains(rows, served, weights) for rows in torch.split(every, step)])
        scratch = torch.empty(step, self.count, device=self.device)
        return torch.cat(
            [
                torch.sub(rows, served, out=scratch[: len(rows)]).clamp_min_(0).mv(weights)
                for rows in torch.split(self.matrix, step)
            ]
        )

    @property
    def greatest_batch(self) -> int:
        """How many rows may be evaluated at once."""
        if self.matrix is not None:
            return _LAST_BATCH
        return max(1, min(_LAST_BATCH, max(self.memory, _BLOCK_BYTES) // (24 * self.count)))


class _Bounds:
    """The bounds of all points, of which only the greatest (the head) are examined.

    A bound never grows, so the others need not be examined until the head has fallen below them.
    """

    def __init__(self, bounds: np.ndarray[Any, Any]) -> None:
        self._all = bounds
        self._known_at = np.zeros(len(bounds), dtype=np.int64)
        self._fill()

    def _fill(self) -> None:
        """Select the greatest bounds, equal ones by their index, in the order of the indices."""
        if len(self._all) <= _HEAD:
            self.head, self._limit = np.arange(len(self._all)), -np.inf
        else:
            # A partition is several times as fast as sorting.
            parted = np.partition(self._all, [-_HEAD - 1, -_HEAD])
            self._limit, least = parted[-_HEAD - 1], parted[-_HEAD]
            above, equal = (self._all > least).nonzero()[0], (self._all == least).nonzero()[0]
            self.head = np.sort(np.concatenate([above, equal[: _HEAD - len(above)]]))
        self.bounds = self._all[self.head]
        self.known_at = self._known_at[self.head]
        self._touched = False

    def best(self) -> int:
        """The position in the head of the greatest bound, the first of equal ones."""
        place = int(self.bounds.argmax())
        if self._touched and self.bounds[place] <= self._limit:
            self._all[self.head], self._known_at[self.head] = self.bounds, self.known_at
            self._fill()
            place = int(self.bounds.argmax())
        return place

    def stale(self, pick: int, most: int) -> np.ndarray[Any, Any]:
        """At most `most` positions that might be picked and whose gain is not known at this pick."""
        known = self.known(pick)
        least = float(self.bounds[known].max(initial=0.0))
        stale: np.ndarray[Any, Any] = (~known & (self.bounds >= least)).nonzero()[0]
        if len(stale) > most:
            stale = stale[self.bounds[stale].argpartition(len(stale) - most)[-most:]]
        return stale

    def known(self, pick: int, places: int | slice = slice(None)) -> Any:
        """Whether the bounds are the gains at this pick; gains never grow, so one of zero is known."""
        return (self.known_at[places] == pick) | (self.bounds[places] <= 0)

    def set(self, places: np.ndarray[Any, Any] | int, values: Any, pick: int) -> None:
        """Update bounds."""
        self.bounds[places] = values
        self.known_at[places] = pick
        self._touched = True


def _pick_lazily(similarity: _Similarity, weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Medoids in order, and each point's position in it, by lazy greedy."""
    device, n = similarity.device, similarity.count
    first = similarity.first_gains(weights).cpu().numpy()
    order = [int(first.argmax())]
    served = similarity.row(order[0]).clone()
    owner = torch.zeros(n, dtype=torch.int64, device=device)
    if count == 1:
        return torch.tensor(order, device=device), owner
    # The gains of the first pick are poor bounds for the second, so all are computed anew.
    gains = similarity.all_gains(served, weights).double().cpu().numpy()
    gains[order[0]] = -1.0
    bounds = _Bounds(gains)
    for pick in range(1, count):
        wanted = min(_FIRST_BATCH, similarity.greatest_batch)
        while not (pick == 1 or bounds.known(pick, bounds.best())):
            places = bounds.stale(pick, wanted)
            chosen = torch.from_numpy(bounds.head[places]).to(device)
            bounds.set(places, similarity.gains(chosen, served, weights).cpu().numpy(), pick)
            wanted = min(2 * wanted, similarity.greatest_batch)
        place = bounds.best()
        order.append(int(bounds.head[place]))
        # Picked points are not picked again.
        bounds.set(place, -1.0, pick)
        row = similarity.row(order[-1])
        owner.masked_fill_(row > served, pick)
        torch.maximum(served, row, out=served)
    return torch.tensor(order, device=device), owner


def _pick_all_gains(similarity: _Similarity, weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The same from all gains at every pick, with nothing read back from the device."""
    gains = similarity.first_gains(weights)
    assert similarity.matrix is not None
    device, n = similarity.device, similarity.count
    served = torch.full((n,), similarity.least, device=device)
    owner = torch.zeros(n, dtype=torch.int64, device=device)
    order = torch.zeros(count, dtype=torch.int64, device=device)
    places = torch.arange(n, device=device)
    taken = torch.zeros(n, dtype=torch.bool, device=device)
    step = max(1, min(n, (64 * 2**20) // (4 * n)))
    for pick in range(count):
        if pick:
            gains = torch.cat(
                [(rows - served).clamp_min_(0).mv(weights) for rows in torch.split(similarity.matrix, step)]
            ).double()
        gains = gains.masked_fill(taken, -1.0)
        best = torch.where(gains == gains.max(), places, n).amin()
        order[pick] = best
        taken[best] = True
        row = similarity.matrix.index_select(0, best[None])[0]
        owner = torch.where(row > served, pick, owner)
        served = torch.maximum(served, row)
    return order, owner
