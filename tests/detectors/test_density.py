"""The first split by density against plain loops, and what FLARE reads and finds."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unpoison import detectors
from unpoison.data import TrainingSet
from unpoison.detectors._density import core_distances, first_split, spanning_tree
from unpoison.detectors.flare import _representations
from unpoison.errors import InputError


def drawn(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)).double()


def test_core_distances_are_those_of_a_plain_loop() -> None:
    points = drawn(20, 1)
    for block_bytes in (1, 1 << 20):
        found = core_distances(points, 4, block_bytes)
        for index, point in enumerate(points.tolist()):
            others = sorted(
                math.dist(point, other) for place, other in enumerate(points.tolist()) if place != index
            )
            assert float(found[index]) == pytest.approx(others[3])


def test_the_spanning_tree_is_as_long_as_that_of_scipy() -> None:
    from scipy.sparse.csgraph import minimum_spanning_tree  # type: ignore[import-untyped]

    points = drawn(40, 2)
    core = core_distances(points, 3, 1 << 20)
    edges, lengths = spanning_tree(points, core)
    reach = torch.maximum(torch.cdist(points, points), torch.maximum(core[:, None], core[None]))
    assert sum(lengths) == pytest.approx(float(minimum_spanning_tree(reach.numpy()).sum()))
    assert len({node for edge in edges for node in edge}) == 40
    for (first, second), length in zip(edges, lengths, strict=True):
        assert length == pytest.approx(float(reach[first, second]))


def test_the_split_and_its_stabilities_are_those_of_a_plain_search() -> None:
    points = torch.cat([drawn(30, 3), 0.2 * drawn(10, 4) + 12, drawn(2, 5) * 0.1 - 40])
    split = first_split(points, neighbours=3, smallest=5, block_bytes=1 << 20)
    assert split is not None
    assert sorted(split.more_stable[0].tolist()) == list(range(30, 40))
    core = core_distances(points, 3, 1 << 20)
    reach = torch.maximum(torch.cdist(points, points), torch.maximum(core[:, None], core[None]))

    def component(start: int, inside: set[int], limit: float) -> set[int]:
        seen, waiting = {start}, [start]
        while waiting:
            one = waiting.pop()
            near = {other for other in inside - seen if float(reach[one, other]) < limit}
            seen |= near
            waiting += near
        return seen

    # The longest distance below which the two clusters of five points or more are apart.
    lengths = sorted({float(value) for value in reach.flatten()}, reverse=True)
    birth = next(
        limit
        for limit in lengths
        if len({frozenset(component(one, set(range(42)), limit)) for one in (0, 30)}) == 2
    )
    for side, stability in zip(split.sides, split.stabilities, strict=True):
        inside, total = set(side.tolist()), 0.0
        members = set(inside)
        for limit in (one for one in lengths if one <= birth):
            parts = {frozenset(component(one, members, limit)) for one in members}
            large = [part for part in parts if len(part) >= 5]
            left = members if len(large) != 1 else members - large[0]
            total += len(left) * (birth / limit - 1)
            members -= left
            if not members:
                break
        assert stability == pytest.approx(total / len(inside), rel=1e-6)


@pytest.mark.parametrize("points", [torch.zeros(30, 2), torch.arange(6.0)[:, None], torch.zeros(1, 2)])
def test_equal_or_few_points_have_no_split_or_a_finite_one(points: Tensor) -> None:
    split = first_split(points, neighbours=3, smallest=4, block_bytes=1 << 20)
    assert split is None or all(map(math.isfinite, split.stabilities))


def layered() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Conv2d(1, 3, 3),
            nn.BatchNorm2d(3),
            nn.ReLU(),
            nn.Conv2d(3, 2, 3),
            nn.BatchNorm2d(2),
            nn.Flatten(),
        )
        for norm in (model[1], model[4]):
            norm.running_mean.uniform_(-1, 1)
            norm.running_var.uniform_(0.5, 2)
    return nn.Sequential(model, nn.Linear(8, 2)).eval()


def images(count: int) -> TrainingSet:
    draw = torch.Generator().manual_seed(7)
    pixels = torch.randint(0, 256, (count, 1, 6, 6), dtype=torch.uint8, generator=draw)
    return TrainingSet(pixels, torch.arange(count) % 2, ("a", "b"), "drawn")


def test_the_abnormal_activation_of_a_channel_is_the_value_farthest_from_its_mean() -> None:
    model, examples = layered(), images(5)
    found = _representations(model, examples, 2)
    assert [tuple(one.shape) for one in found] == [(5, 3), (5, 2)]
    body: Any = model[0]
    with torch.no_grad():
        given = body[0](examples.images.float() / 255)
    for example in range(5):
        for channel in range(3):
            mean, variance = body[1].running_mean[channel], body[1].running_var[channel]
            values = ((given[example, channel] - mean) / (variance + body[1].eps).sqrt()).flatten().tolist()
            assert float(found[0][example, channel]) == pytest.approx(max(values, key=abs), abs=1e-5)


def test_a_network_without_batch_norms_is_read_at_its_other_layers() -> None:
    plain = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4), nn.Linear(4, 2))
    assert [one.shape[1] for one in _representations(plain.eval(), images(6), 4)] == [3, 4]
    with pytest.raises(InputError, match="the model has none"):
        _representations(nn.Sequential(nn.Flatten(), nn.Linear(36, 2)).eval(), images(6), 4)


def test_a_planted_trigger_is_the_more_stable_cluster() -> None:
    examples, planted = images(300), list(range(0, 300, 20))
    faint = (examples.images.float() * 0.3 + 60).round().to(torch.uint8)
    faint[planted] = torch.tensor([255, 255, 255, 0, 0, 0], dtype=torch.uint8)
    examples = replace(examples, images=faint)
    found = detectors.get("flare").find(layered(), examples)
    assert sorted(found.flagged.tolist()) == planted
    assert found.evidence["stability"].nonzero()[:, 0].tolist() == planted
    others = examples.subset([index for index in range(300) if index not in planted])
    assert not detectors.get("flare").find(layered(), others).poison_found


def test_a_trained_network_without_batch_norms_is_searched(scene: Any) -> None:
    found = detectors.get("flare").find(scene.model, scene.poisoned)
    # What it finds depends on the network.
    assert found.evidence["stability"].shape == (len(scene.poisoned),)
    assert "layers" in found.threshold.how
