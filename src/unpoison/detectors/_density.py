"""The first split of a set by density, as HDBSCAN makes it, and how stable its two sides are.

Campello, Moulavi and Sander, "Density-Based Clustering Based on Hierarchical Density Estimates" (PAKDD 2013).
The distance of two points counts at least as much as the distance of either to its k-th neighbour (mutual
reachability). The minimum spanning tree of these distances is cut at its longest edges in turn; sides with
fewer points than a cluster must have fall out, and the first cut that leaves two clusters is the split.

Cost: 3/2 n^2 d multiplications for n points in d dimensions. Memory: a few numbers a point, and
`block_bytes` of distances.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor


@final
@dataclass(frozen=True, eq=False)
class Split:
    """Two clusters.

    Arguments:
        sides: Int64[a] and Int64[b], the points of each.
        stabilities: of each: the mean over its points of 1 / distance where the point leaves it minus
            1 / distance of the split, in units of the latter.
    """

    sides: tuple[Tensor, Tensor]
    stabilities: tuple[float, float]

    @property
    def held(self) -> int:
        """How many points both have."""
        return len(self.sides[0]) + len(self.sides[1])

    @property
    def more_stable(self) -> tuple[Tensor, float]:
        """The points of the more stable side, and its stability."""
        place = int(self.stabilities[1] > self.stabilities[0])
        return self.sides[place], self.stabilities[place]

    @property
    def smaller_is_more_stable(self) -> bool:
        """Whether the more stable side has fewer points than the other."""
        return 2 * len(self.more_stable[0]) < self.held

    @property
    def strength(self) -> tuple[bool, float]:
        """Greater where the smaller side is the more stable one, and the more so the stabler it is."""
        return self.smaller_is_more_stable, self.more_stable[1]


def first_split(points: Tensor, *, neighbours: int, smallest: int, block_bytes: int) -> Split | None:
    """The first split of Float[n d] points into two clusters of `smallest` points or more; None without one.

    Arguments:
        points: finite.
        neighbours: k, of the core distance.
        smallest: the size of a cluster at least.
        block_bytes: of distances at a time.

    >>> points = torch.tensor([[0.0], [0.1], [0.2], [0.3], [5.0], [5.01], [5.02]])
    >>> found = first_split(points, neighbours=1, smallest=3, block_bytes=1 << 20)
    >>> [side.tolist() for side in found.sides], found.more_stable[0].tolist()
    ([[0, 1, 2, 3], [4, 5, 6]], [4, 5, 6])
    """
    count = len(points)
    if count < max(2, 2 * smallest):
        return None
    points = points.double()
    core = core_distances(points, min(neighbours, count - 1), block_bytes)
    tree = _Tree(count, *spanning_tree(points, core))
    node = tree.split(tree.root, smallest)
    if node is None:
        return None
    birth = tree.height(node)
    sides = tuple(tree.points(child) for child in tree.children(node))
    stabilities = tuple(birth * tree.stability(child, smallest, birth) for child in tree.children(node))
    return Split((sides[0], sides[1]), (stabilities[0], stabilities[1]))


def core_distances(points: Tensor, neighbours: int, block_bytes: int) -> Tensor:
    """Float64[n]: the distance of each point to its `neighbours`-th nearest other one."""
    step = max(1, block_bytes // (16 * len(points)))
    return torch.cat(
        [
            torch.cdist(part, points).topk(neighbours + 1, dim=1, largest=False).values[:, -1]
            for part in torch.split(points, step)
        ]
    )


def spanning_tree(points: Tensor, core: Tensor) -> tuple[list[tuple[int, int]], list[float]]:
    """The n - 1 edges of the minimum spanning tree by mutual reachability, and their lengths (Prim).

    On the CPU, in NumPy: each step is a few operations on a short array, which a kernel each would slow down.
    """
    columns, own = points.double().cpu().numpy().T.copy(), core.double().cpu().numpy()
    nodes, far = np.arange(len(own)), own.copy()
    best, source = np.full(len(own), np.inf), np.zeros(len(own), dtype=np.int64)
    edges: list[tuple[int, int]] = []
    lengths: list[float] = []
    place = 0
    for _ in range(len(own) - 1):
        current = int(nodes[place])
        best[place] = far[place] = np.inf  # in the tree: never closer, never the closest
        apart = columns - columns[:, place, None]
        reach = np.sqrt(np.einsum("ij,ij->j", apart, apart))
        np.maximum(reach, np.maximum(far, own[current]), out=reach)
        closer = reach < best
        np.copyto(best, reach, where=closer)
        source[closer] = current
        place = int(best.argmin())
        edges.append((int(source[place]), int(nodes[place])))
        lengths.append(float(best[place]))
        if len(own) - len(edges) < 0.8 * len(nodes):  # leave those in the tree behind
            left = np.isfinite(far)
            place = int(np.count_nonzero(left[:place]))
            columns = columns[:, left].copy()
            nodes, far, best, source = nodes[left], far[left], best[left], source[left]
    return edges, lengths


@final
class _Tree:
    """The merges of a spanning tree, shortest edge first: nodes below `count` are points."""

    def __init__(self, count: int, edges: list[tuple[int, int]], lengths: list[float]) -> None:
        self.count = count
        self._children: list[tuple[int, int]] = []
        self._heights: list[float] = []
        self.sizes = [1] * count
        # Of equal points the density is without bound; this keeps it finite.
        self._least = 1e-6 * max(lengths, default=1.0) or 1e-6
        parent = list(range(2 * count - 1))

        def top(node: int) -> int:
            while parent[node] != node:
                parent[node] = parent[parent[node]]
                node = parent[node]
            return node

        for place in sorted(range(len(edges)), key=lengths.__getitem__):
            first, second = (top(one) for one in edges[place])
            node = count + len(self._children)
            parent[first] = parent[second] = node
            self._children.append((first, second))
            self._heights.append(max(lengths[place], self._least))
            self.sizes.append(self.sizes[first] + self.sizes[second])
        self.root = count + len(self._children) - 1

    def children(self, node: int) -> tuple[int, int]:
        return self._children[node - self.count]

    def height(self, node: int) -> float:
        return self._heights[node - self.count]

    def points(self, node: int) -> Tensor:
        """Int64[m], in order."""
        found, waiting = [], [node]
        while waiting:
            one = waiting.pop()
            if one < self.count:
                found.append(one)
            else:
                waiting += self.children(one)
        return torch.tensor(sorted(found), dtype=torch.int64)

    def split(self, node: int, smallest: int) -> int | None:
        """The node at which a cluster splits into two; None where it does not."""
        while self.sizes[node] >= 2 * smallest:
            smaller, larger = sorted(self.children(node), key=self.sizes.__getitem__)
            if self.sizes[smaller] >= smallest:
                return node
            node = larger
        return None

    def stability(self, node: int, smallest: int, birth: float) -> float:
        """The mean over the points of a cluster of how much denser it is where they leave it."""
        total, size, last = 0.0, self.sizes[node], 1 / birth
        while node >= self.count:
            first, second = self.children(node)
            last = 1 / self.height(node)
            smaller, larger = sorted((first, second), key=self.sizes.__getitem__)
            if self.sizes[smaller] >= smallest or self.sizes[larger] < smallest:
                break  # it splits, or is too small to be a cluster
            total += self.sizes[smaller] * (last - 1 / birth)
            node = larger
        return (total + self.sizes[node] * (last - 1 / birth)) / size
