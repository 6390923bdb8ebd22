"""Clusters of gradients within a label."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unpoison.data import TrainingSet
from unpoison.detectors import GradientClusters
from unpoison.detectors import gradient_clusters as clusters
from unpoison.errors import InputError
from unpoison.influence import InfluenceIndex, RelativeDamping


class Rows:
    """What is asked of an index, of unit gradients Float64[n d]."""

    def __init__(self, units: Tensor, lengths: Tensor) -> None:
        self.units, self.every = torch.nn.functional.normalize(units), lengths

    def cosines(self, indices: Tensor, rows: Tensor) -> Tensor:
        return self.units[indices] @ self.units[rows].t()

    def lengths(self, rows: Tensor) -> Tensor:
        return self.every[rows]


def drawn(planted: int, seed: int = 0) -> Any:
    randomness = torch.Generator().manual_seed(seed)
    common = torch.randn(2, 60, generator=randomness, dtype=torch.float64)
    units = torch.randn(240, 60, generator=randomness, dtype=torch.float64) + 2 * common[0]
    units[:planted] += 2.5 * common[1] - common[0]
    return Rows(units, 1 + torch.rand(240, generator=randomness, dtype=torch.float64))


@pytest.mark.parametrize("most", [2048, 120])
def test_a_planted_direction_is_found(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(clusters, "_MOST", most)
    rows = torch.arange(240)
    found = clusters.cluster_of(drawn(24), rows)
    assert found is not None
    assert found.separation >= 2
    assert found.members.nonzero()[:, 0].tolist() == list(range(24))
    assert len(found.scores) == 240


def test_without_one_hardly_anything_is_separated() -> None:
    for seed in range(3):
        found = clusters.cluster_of(drawn(0, seed), torch.arange(240))
        assert found is None or found.separation < 2


def test_an_index_gives_what_one_of_its_own_gives(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    images = torch.randint(256, (40, 1, 6, 6), dtype=torch.uint8)
    train = TrainingSet(images, torch.arange(40) % 2, ("a", "b"), "drawn")
    with pytest.raises(InputError, match="separation"):
        GradientClusters(separation=0.0)
    detector = GradientClusters(separation=1e-3)
    alone = detector.find(model, train, seed=1)
    factors = clusters.Search(detector, model, train, None, None, 1, None, None).factors
    index = InfluenceIndex.build(
        tmp_path / "index", model, train, factors=factors, damping=RelativeDamping(0.1)
    )
    through = detector.find(model, train, index=index)
    assert torch.allclose(alone.scores, through.scores, atol=1e-6)
    assert alone.poison_found == bool(len(alone.flagged))
    assert bool((alone.scores[alone.flagged] > 1).all())
    assert bool((GradientClusters(separation=1e6).find(model, train, index=index).scores <= 1).all())
