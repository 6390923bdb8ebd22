"""SCAn: one class of two groups among many of one, none among none, and a clean reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from unpoison.data import TrainingSet
from unpoison.detectors import StatisticalContamination
from unpoison.detectors._representations import Reader
from unpoison.detectors.statistical_contamination import anomaly
from unpoison.errors import InputError


def test_the_second_group_is_found(planted: Any) -> None:
    scene = planted(classes=6)
    found = StatisticalContamination(dimensions=8).find(scene.model, scene.training_set)
    assert set(found.flagged.tolist()) == scene.poison
    assert "target" in found.summary
    assert len(set(found.evidence["anomaly"].tolist())) == 6


def test_nothing_is_found_in_a_clean_set(planted: Any) -> None:
    scene = planted(gap=0.0, classes=6)
    found = StatisticalContamination(dimensions=8).find(scene.model, scene.training_set)
    assert not found.poison_found
    assert float(found.scores.max()) < 0


def test_deviations_are_whitened(planted: Any) -> None:
    scene = planted(gap=0.0)
    detector = StatisticalContamination(dimensions=5)
    reader = Reader(scene.model, scene.training_set, module=None, batch_size=33)
    whiten = detector._whitening(reader)
    features = reader.all().double()
    for label in range(3):
        rows = scene.training_set.labels == label
        features[rows] -= features[rows].mean(0)
    white = features @ whiten
    torch.testing.assert_close(white.t() @ white / len(white), torch.eye(5, dtype=torch.float64))


def test_a_reference_improves_the_covariance(planted: Any) -> None:
    scene, clean = planted(classes=6), planted(gap=0.0, classes=6)
    detector = StatisticalContamination(dimensions=8)
    alone = detector.find(scene.model, scene.training_set)
    trusted = detector.find(scene.model, scene.training_set, reference=clean.training_set)
    poison = min(scene.poison)
    assert trusted.evidence["anomaly"][poison] > alone.evidence["anomaly"][poison]
    small = TrainingSet(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.arange(4) % 2, ("a", "b"), "small")
    with pytest.raises(InputError, match="small: a reference needs inputs of shape"):
        detector.find(scene.model, scene.training_set, reference=small)


def test_two_classes_are_too_few() -> None:
    assert anomaly({0: 1.0, 4: 90.0}) == {0: 0.0, 4: 0.0}
    with pytest.raises(InputError, match="dimensions"):
        StatisticalContamination(dimensions=0)
