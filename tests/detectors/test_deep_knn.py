"""Deep k-NN: votes against a loop, mislabelled examples, blocks, and small sets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from unpoison.data import TrainingSet
from unpoison.detectors import DeepKNN
from unpoison.detectors.deep_knn import neighbour_votes
from unpoison.errors import InputError


@pytest.mark.parametrize("block_bytes", [1, 1000, 1 << 20])
@pytest.mark.parametrize("count", [1, 4, 29])
def test_votes_are_those_of_a_loop(count: int, block_bytes: int) -> None:
    randomness = torch.Generator().manual_seed(0)
    features = torch.randn(30, 5, generator=randomness) + 100
    labels = torch.randint(0, 3, (30,), generator=randomness)
    own, other = neighbour_votes(features, labels, 4, count, block_bytes=block_bytes)
    for row in range(30):
        distances = [
            (float((features[row].double() - features[place].double()).norm()), place)
            for place in range(30)
            if place != row
        ]
        nearest = [int(labels[place]) for _, place in sorted(distances)[:count]]
        mine = int(labels[row])
        assert int(own[row]) == nearest.count(mine)
        assert int(other[row]) == max(nearest.count(label) for label in range(4) if label != mine)


def test_mislabelled_examples_are_outvoted(planted: Any) -> None:
    scene = planted(gap=0.0)
    labels = scene.training_set.labels.clone()
    wrong = [0, 10, 20, 31]
    labels[wrong] = (labels[wrong] + 1) % 3
    mislabelled = TrainingSet(scene.training_set.images, labels, scene.training_set.class_names)
    found = DeepKNN(expected_share=0.02).find(scene.model, mislabelled)
    assert sorted(found.flagged.tolist()) == wrong
    assert found.threshold.value == 0
    assert "13 nearest" in found.threshold.how


def test_a_set_of_one_has_no_neighbours(planted: Any) -> None:
    scene = planted()
    found = DeepKNN().find(scene.model, scene.training_set.subset([0]))
    assert found.scores.tolist() == [0]
    assert not found.poison_found


@pytest.mark.parametrize("options", [{"expected_share": 0.0}, {"expected_share": 0.5}, {"neighbours": 0}])
def test_impossible_settings(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="deep-knn"):
        DeepKNN(**options)
