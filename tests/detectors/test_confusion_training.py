"""Confusion training: wrong labels are wrong, and a planted trigger keeps its label."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from unpoison import detectors
from unpoison.detectors.confusion_training import wrong_labels
from unpoison.errors import InputError


def test_wrong_labels_are_each_of_the_others_equally_often() -> None:
    labels = torch.arange(4).repeat(3000)
    drawn = wrong_labels(labels, 4, torch.Generator().manual_seed(1))
    counts = Counter(zip(labels.tolist(), drawn.tolist(), strict=True))
    assert all((label, label) not in counts for label in range(4))
    assert all(
        850 < counts[label, other] < 1150 for label in range(4) for other in range(4) if label != other
    )


def test_a_trigger_keeps_its_label_and_clean_examples_lose_theirs(scene: Any) -> None:
    detector = detectors.get("confusion-training", steps=60, concentrations=[0.2], batch_size=32)
    found = detector.find(scene.model, scene.poisoned, reference=scene.held_out, seed=1)
    judged = found.judge(scene.poison)
    assert judged.recall.rate > 0.9
    assert judged.false_positives.rate < 0.2
    again = detector.find(scene.model, scene.poisoned, reference=scene.held_out, seed=1)
    assert torch.equal(found.scores, again.scores)
    assert int(found.evidence["rounds_fitted"].max()) == 2


def test_options_out_of_range_are_refused() -> None:
    for options in ({"steps": 0}, {"confusion": 0.5}, {"concentrations": [0.0]}, {"learning_rate": 0.0}):
        with pytest.raises(InputError):
            detectors.get("confusion-training", **options)
    assert detectors.get("confusion-training", preset="original").steps == 6000  # type: ignore[attr-defined]
