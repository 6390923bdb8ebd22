"""Near-duplicates: by groups, and measured on the images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unpoison.data import TrainingSet
from unpoison.detectors import _near_duplicates
from unpoison.detectors._near_duplicates import group_numbers, multiplicities
from unpoison.errors import InputError


def make_set(images: Tensor, labels: Tensor) -> TrainingSet:
    return TrainingSet(images, labels, ("a", "b"))


def noise(count: int, seed: int, side: int = 20) -> Tensor:
    randomness = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (count, 1, side // 4, side // 4), generator=randomness)
    return coarse.repeat_interleave(4, 2).repeat_interleave(4, 3).to(torch.uint8)


def test_groups_count_within_the_label() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 0])
    numbers = group_numbers(["x", "x", "y", "x", "x", "z"], 6)
    assert numbers.tolist() == [0, 0, 1, 0, 0, 2]
    found = multiplicities(make_set(noise(6, 0), labels), numbers)
    assert found.tolist() == [2, 2, 1, 2, 2, 1]
    assert group_numbers(torch.tensor([7, 7, 3]), 3).tolist() == [0, 0, 1]
    with pytest.raises(InputError, match=r"groups: needs one for each of the 6 training examples, found 2"):
        group_numbers(["x", "y"], 6)


def test_series_of_similar_images_count_once_and_others_each() -> None:
    images = noise(60, 1)
    wobble = torch.randint(-6, 7, (20, 1, 20, 20), generator=torch.Generator().manual_seed(2))
    images[:20] = (images[:1].int() + wobble).clamp(0, 255).byte()
    labels = torch.zeros(60, dtype=torch.int64)
    found = multiplicities(make_set(images, labels))
    assert float(found[:20].min()) > 15
    assert float(found[20:].max()) < 1.5
    assert float((1 / found).sum()) == pytest.approx(41, abs=3)
    # Brightness and the other label do not matter.
    darker = make_set((images.float() * 0.5).byte(), labels)
    assert torch.allclose(multiplicities(darker)[:20], found[:20], rtol=0.1)
    labels[10:20] = 1
    assert float(multiplicities(make_set(images, labels))[:10].max()) < 11


def test_many_examples_are_compared_with_some(monkeypatch: pytest.MonkeyPatch) -> None:
    images = noise(400, 3)
    images[:200] = images[:1]
    training_set = make_set(images, torch.zeros(400, dtype=torch.int64))
    exact = multiplicities(training_set)
    monkeypatch.setattr(_near_duplicates, "_MOST", 100)
    some = multiplicities(training_set)
    assert torch.allclose(some[:200], exact[:200], rtol=0.3)
    assert float(some[200:].max()) < 6


def test_likeness_is_summed_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = _near_duplicates.thumbnails(noise(50, 4))
    unit = _near_duplicates.median_distance(pixels)
    expected = torch.exp(-((torch.cdist(pixels.double(), pixels.double()) / (0.35 * unit)) ** 2)).sum(1)
    assert torch.allclose(_near_duplicates.similar_to(pixels, unit), expected, rtol=1e-5)
    monkeypatch.setattr(_near_duplicates, "_CHUNK", 7)
    assert torch.allclose(_near_duplicates.similar_to(pixels, unit), expected, rtol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_few_and_equal_images(count: int) -> None:
    images = torch.full((count, 3, 4, 4), 90, dtype=torch.uint8)
    found = multiplicities(make_set(images, torch.zeros(count, dtype=torch.int64)))
    assert found.tolist() == pytest.approx([count] * count)
