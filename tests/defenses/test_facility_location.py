"""Greedy facility location against plain loops, and at its edges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unpoison.defenses._facility_location import (
    Clusters,
    Kernel,
    _merged,
    _pick_all_gains,
    _Similarity,
    greedy_medoids,
)
from unpoison.errors import InputError


def gradients(count: int, *, classes: int = 5, seed: int = 0) -> Tensor:
    """Softmax gradients of one class, from nearly zero to far out."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, classes, generator=generator, dtype=torch.float64)
    logits[:, 0] += 8 * torch.rand(count, generator=generator, dtype=torch.float64)
    probabilities = logits.softmax(1)
    probabilities[:, 0] -= 1
    return probabilities


def assert_greedy(found: Clusters, points: Tensor, count: int, kernel: Kernel = "exponential") -> None:
    """Every pick gains as much as the best of plain loops, and every point has its most similar medoid.

    Two points that would serve each other gain the same, so the order of the picks is not unique.
    """
    rows = points.tolist()
    n, d = len(rows), len(rows[0])

    def similarity(i: int, j: int) -> float:
        distance = math.dist(rows[i], rows[j])
        return math.exp(-distance / d) if kernel == "exponential" else -distance

    served = [0.0 if kernel == "exponential" else -1e3] * n
    medoids = found.medoids.tolist()
    assert len(medoids) == len(set(medoids)) == min(count, len({tuple(row) for row in rows}))
    for medoid in medoids:
        gains = [sum(max(similarity(i, j) - served[i], 0.0) for i in range(n)) for j in range(n)]
        assert gains[medoid] >= max(gains) * (1 - 1e-5) - 1e-12
        served = [max(served[i], similarity(i, medoid)) for i in range(n)]
    for i, owner in enumerate(found.owner.tolist()):
        assert similarity(i, medoids[owner]) >= served[i] - 1e-7
    assert found.sizes.tolist() == [found.owner.tolist().count(place) for place in range(len(medoids))]


@pytest.mark.parametrize("kernel", ["exponential", "distance"])
@pytest.mark.parametrize("count", [1, 4, 20, 39])
@pytest.mark.parametrize("memory", [0, 2**20])
def test_it_is_what_plain_loops_find(kernel: Kernel, count: int, memory: int) -> None:
    points = gradients(40)
    found = greedy_medoids(points, count, kernel=kernel, memory=memory)
    assert_greedy(found, points, count, kernel)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 30), st.integers(1, 30), st.integers(0, 1000))
def test_any_cloud(n: int, count: int, seed: int) -> None:
    points = gradients(n, seed=seed)
    found = greedy_medoids(points, count)
    assert_greedy(found, points, count)


@pytest.mark.parametrize("kernel", ["exponential", "distance"])
def test_what_an_accelerator_does_is_the_same(kernel: Kernel) -> None:
    points = gradients(200)
    distinct, first, group, weights = _merged(torch.cat([points, points[:30]]))
    order, owner = _pick_all_gains(_Similarity(distinct, kernel, 2**30, None), weights, 50)
    lazily = greedy_medoids(torch.cat([points, points[:30]]), 50, kernel=kernel)
    assert torch.equal(first[order], lazily.medoids)
    assert torch.equal(owner[group], lazily.owner)


def test_large_clouds_need_many_batches() -> None:
    points = gradients(1500, seed=3)
    stored, computed = greedy_medoids(points, 150), greedy_medoids(points, 150, memory=2**20)
    assert torch.equal(stored.medoids, computed.medoids)
    assert torch.equal(stored.owner, computed.owner)


def test_duplicates_count_as_often_as_they_occur() -> None:
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [5.0, 5.0]])
    found = greedy_medoids(points, 5)
    assert found.medoids.tolist() == [0, 4, 1]
    assert found.size_of_each.tolist() == [3, 1, 3, 3, 1]


def test_ties_go_to_the_lower_index() -> None:
    found = greedy_medoids(torch.eye(4), 2)
    assert found.medoids.tolist() == [0, 1]
    assert found.owner.tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(("n", "count"), [(0, 3), (3, 0), (1, 1), (1, 7), (3, 9)])
def test_tiny_clouds(n: int, count: int) -> None:
    found = greedy_medoids(gradients(n), count)
    picked = min(n, count)
    assert len(found.medoids) == picked
    assert sorted(found.medoids.tolist()) == list(range(n))[:picked]
    if picked:
        assert int(found.sizes.sum()) == n
    else:
        assert found.owner.tolist() == [-1] * n


def test_near_zero_gradients_are_told_apart() -> None:
    points = gradients(30)
    tiny, plain = (greedy_medoids(scale * points, 10, kernel="distance") for scale in (1e-9, 1.0))
    assert torch.equal(tiny.owner, plain.owner)
    far = torch.full((1, points.shape[1]), 0.5)
    with_far = greedy_medoids(torch.cat([1e-9 * points, far]), 11)
    assert len(with_far.sizes[with_far.owner[:-1]].unique()) > 1


@pytest.mark.parametrize(
    "points",
    [torch.tensor([[0.0, math.nan]]), torch.tensor([[math.inf]]), torch.zeros(3), torch.ones(2, 2).int()],
)
def test_points_that_are_none(points: Tensor) -> None:
    with pytest.raises(InputError, match="points: "):
        greedy_medoids(points, 1)


def test_sizes() -> None:
    found = Clusters(torch.tensor([3, 1]), torch.tensor([0, 1, 0, 0]))
    assert found.sizes.tolist() == [3, 1]
