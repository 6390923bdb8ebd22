"""Beatrix: Gram matrices, bounds and discrepancies against plain loops, and a planted group."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from unpoison import detectors
from unpoison.data import TrainingSet
from unpoison.detectors.beatrix import _Bounds, _Maps, discrepancy, gram_matrices
from unpoison.errors import InputError


def test_gram_matrices_are_those_of_a_plain_loop() -> None:
    maps = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    found = gram_matrices(maps, 3)
    assert found.shape == (2, 18)
    for example in range(2):
        expected = []
        for order in (1, 2, 3):
            for first in range(3):
                for second in range(first, 3):
                    total = sum(
                        float(maps[example, first, place]) ** order
                        * float(maps[example, second, place]) ** order
                        for place in range(4)
                    )
                    expected.append(math.copysign(abs(total) ** (1 / order), total))
        assert found[example].tolist() == pytest.approx(expected, rel=1e-5)


def test_the_deviation_is_that_of_a_plain_loop() -> None:
    draw = torch.Generator().manual_seed(2)
    clean, others = (torch.randn(count, 3, generator=draw).double() for count in (9, 4))
    found = _Bounds.of(clean, 2.0).deviation(others * 5)
    for example in range(4):
        total = 0.0
        for entry in range(3):
            values = sorted(clean[:, entry].tolist())
            middle = values[4]
            reach = 2 * sorted(abs(value - middle) for value in values)[4]
            low, high, value = middle - reach, middle + reach, float(others[example, entry] * 5)
            total += max(0.0, low - value) / (abs(low) + 1e-6) + max(0.0, value - high) / (abs(high) + 1e-6)
        assert float(found[example]) == pytest.approx(total)


def test_the_discrepancy_is_that_of_a_plain_loop() -> None:
    draw = torch.Generator().manual_seed(3)
    first, second = torch.randn(4, 2, generator=draw), 1 + torch.randn(3, 2, generator=draw)
    joint = torch.cat([first, second]).double()
    squares = sorted(math.dist(a, b) ** 2 for a in joint.tolist() for b in joint.tolist() if a != b)
    width = squares[(len(squares) - 1) // 2]

    def kernel(a: list[float], b: list[float]) -> float:
        return math.exp(-(math.dist(a, b) ** 2) / width)

    def mean(some: Any, others: Any) -> float:
        values = [kernel(a, b) for a in some.double().tolist() for b in others.double().tolist()]
        return sum(values) / len(values)

    expected = mean(first, first) + mean(second, second) - 2 * mean(first, second)
    assert discrepancy(first, second) == pytest.approx(expected)
    assert discrepancy(first[:0], second) == 0.0


class Maps(nn.Module):
    """Two channels of the image, as they are, and logits by their means."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Identity()
        self.last = nn.Linear(2, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.last(self.maps(images).mean((2, 3)))
        return logits


def planted() -> tuple[TrainingSet, TrainingSet, list[int]]:
    """Five classes of noise; in a tenth of the first the two channels are equal."""
    draw = torch.Generator().manual_seed(5)
    images = torch.randint(80, 150, (600, 2, 4, 4), dtype=torch.uint8, generator=draw)
    labels = torch.arange(600) % 5
    poison = (labels == 0).nonzero()[:12, 0]
    images[poison, :, :2] = 250
    names = tuple("abcde")
    clean = torch.randint(80, 150, (500, 2, 4, 4), dtype=torch.uint8, generator=draw)
    return (
        TrainingSet(images, labels, names, "planted"),
        TrainingSet(clean, torch.arange(500) % 5, names, "clean"),
        poison.tolist(),
    )


@pytest.mark.parametrize("trusted", [True, False])
def test_a_class_with_a_group_of_its_own_is_contaminated(trusted: bool) -> None:
    training_set, clean, poison = planted()
    detector = detectors.get("beatrix", orders=3)
    found = detector.find(Maps().eval(), training_set, reference=clean if trusted else None)
    assert set(found.flagged.tolist()) >= set(poison)
    assert set(training_set.labels[found.flagged].tolist()) == {0}
    without = detector.find(Maps().eval(), clean, reference=None)
    assert not without.poison_found


def test_what_is_read_is_the_last_output_with_positions() -> None:
    images = torch.zeros(1, 1, 8, 8)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)
    )
    assert _Maps(model.eval(), images, None).module == "1"
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Linear(4, 3)).eval()
    reader = _Maps(flat, images, None)
    assert (reader.module, reader.side) == ("2", "input")


def test_two_classes_are_too_few_and_options_are_checked() -> None:
    training_set, _, _ = planted()
    two = training_set.subset((training_set.labels < 2).nonzero()[:, 0])
    assert "Cannot be judged" in detectors.get("beatrix", orders=2).find(Maps().eval(), two).summary
    for options in ({"orders": 0}, {"per_class": 1}, {"quantile": 1.0}, {"width": 0.0}):
        with pytest.raises(InputError):
            detectors.get("beatrix", **options)
