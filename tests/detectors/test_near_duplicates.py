"""Near-duplicates: by groups, and measured on the images."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from unpoison.data import TensorExamples, TrainingSet
from unpoison.detectors import _near_duplicates
from unpoison.detectors._near_duplicates import NearDuplicates, group_numbers
from unpoison.errors import InputError


def make_set(images: Tensor, labels: Tensor) -> TrainingSet:
    return TrainingSet(images, labels, ("a", "b"))


def noise(count: int, seed: int, side: int = 20) -> Tensor:
    randomness = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (count, 1, side // 4, side // 4), generator=randomness)
    return coarse.repeat_interleave(4, 2).repeat_interleave(4, 3).to(torch.uint8)


def multiplicities(training_set: TrainingSet, groups: Tensor | None = None) -> tuple[Tensor, Tensor]:
    near = NearDuplicates.of(training_set, groups)
    near.measure(training_set, torch.arange(len(training_set)))
    return near.multiplicities, near.spacings


def test_groups_count_within_the_label() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 0])
    numbers = group_numbers(["x", "x", "y", "x", "x", "z"], 6)
    assert numbers.tolist() == [0, 0, 1, 0, 0, 2]
    found, _ = multiplicities(make_set(noise(6, 0), labels), numbers)
    assert found.tolist() == [2, 2, 1, 2, 2, 1]
    assert group_numbers(torch.tensor([7, 7, 3]), 3).tolist() == [0, 0, 1]
    with pytest.raises(InputError, match=r"groups: needs one for each of the 6 training examples, found 2"):
        group_numbers(["x", "y"], 6)


def test_series_of_similar_images_count_once_and_others_each() -> None:
    images = noise(400, 1)
    wobble = torch.randint(-6, 7, (20, 1, 20, 20), generator=torch.Generator().manual_seed(2))
    images[:20] = (images[:1].int() + wobble).clamp(0, 255).byte()
    labels = torch.zeros(400, dtype=torch.int64)
    labels[200:] = 1
    found, _ = multiplicities(make_set(images, labels))
    assert float(found[:20].min()) > 15
    assert float(found[20:].max()) < 12
    assert float(found[20:].median()) < 6
    # Brightness does not matter, and a near-duplicate with the other label does not count.
    darker = make_set((images.float() * 0.5).byte(), labels)
    assert torch.allclose(multiplicities(darker)[0][:20], found[:20], rtol=0.1)
    labels[10:20] = 1
    assert float(multiplicities(make_set(images, labels))[0][:10].max()) < 12
    near = NearDuplicates.of(make_set(images, labels))
    alike = near.alike_among(make_set(images, labels), torch.arange(5))
    assert alike.tolist() == pytest.approx([5] * 5, rel=0.1)
    alike = near.alike_among(make_set(images, labels), torch.arange(30, 35))
    assert alike.tolist() == pytest.approx([1] * 5, rel=0.2)


def test_a_common_kind_of_object_is_no_series() -> None:
    """Images that are as close to each other as to many more, whatever their labels."""
    randomness = torch.Generator().manual_seed(4)
    change = torch.randint(-40, 41, (300, 1, 20, 20), generator=randomness)
    images = noise(400, 5)
    images[:300] = (images[:1].int().clamp(60, 190) + change).byte()
    labels = torch.zeros(400, dtype=torch.int64)
    labels[25:300] = 1
    found, _ = multiplicities(make_set(images, labels))
    assert float(found[:25].max()) < 2.5


def test_measured_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    training_set = make_set(noise(50, 4), torch.arange(50) % 2)
    pixels = _near_duplicates.thumbnails(training_set.images).double()
    distances = [[float((j - k).norm()) for k in pixels] for j in pixels]
    spacings = [sorted(row)[6] for row in distances]
    expected = [
        sum(
            math.exp(-(distances[j][k] ** 2) / (0.25 * spacings[j] * spacings[k]))
            for k in range(j % 2, 50, 2)
        )
        for j in range(50)
    ]
    for _ in range(2):
        found = multiplicities(training_set)
        assert found[0].tolist() == pytest.approx(expected, rel=1e-4)
        assert found[1].tolist() == pytest.approx(spacings, rel=1e-4)
        monkeypatch.setattr(_near_duplicates, "_CHUNK", 7)


def test_many_examples_are_compared_with_some(monkeypatch: pytest.MonkeyPatch) -> None:
    images = noise(400, 3)
    images[:100] = images[:1]
    training_set = make_set(images, torch.zeros(400, dtype=torch.int64))
    exact, spacings = multiplicities(training_set)
    monkeypatch.setattr(_near_duplicates, "_MOST", 100)
    some, _ = multiplicities(training_set)
    assert torch.allclose(some[:100], exact[:100], rtol=0.4)
    assert float((some[100:] / exact[100:]).log().abs().mean()) < 0.7
    monkeypatch.setattr(_near_duplicates, "_MOST", 4096)
    monkeypatch.setattr(_near_duplicates, "_COMPARED", 200)
    some, close = multiplicities(training_set)
    assert torch.allclose(close[100:], spacings[100:], rtol=0.1)
    assert float((some / exact).log().abs().mean()) < 0.1


def test_of_many_examples_those_that_are_asked_for_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    images = noise(400, 3)
    images[:20] = images[:1]
    training_set = make_set(images, torch.arange(400) // 300)
    monkeypatch.setattr(_near_duplicates, "_COMPARED", 200)
    monkeypatch.setattr(_near_duplicates, "_MOST", 50)
    every, spacings = multiplicities(training_set)
    near = NearDuplicates.of(training_set)
    assert bool(near.multiplicities.isinf().all())
    near.measure(training_set, torch.tensor([3, 350, 3]))
    assert near.multiplicities.isfinite().nonzero()[:, 0].tolist() == [3, 350]
    assert int((near.spacings > 0).sum()) <= 2 + 2 * 50
    for rows in (torch.arange(20), torch.arange(400)):
        near.measure(training_set, rows)
    assert torch.allclose(near.multiplicities, every)
    assert torch.allclose(near.spacings, spacings)
    # Among many members some stand for all.
    assert near.alike_among(training_set, torch.arange(90)).shape == (90,)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_few_and_equal_images(count: int) -> None:
    images = torch.full((count, 3, 4, 4), 90, dtype=torch.uint8)
    found, _ = multiplicities(make_set(images, torch.zeros(count, dtype=torch.int64)))
    assert found.tolist() == pytest.approx([count] * count)


def test_likeness_of_pairs_is_what_is_summed() -> None:
    images = noise(60, 5)
    images[10:14] = images[10]
    training_set = make_set(images, torch.arange(60) % 2)
    near, rows = NearDuplicates.of(training_set), torch.arange(5, 40)
    places = torch.arange(len(rows))
    likeness = near.likeness(training_set, rows)(places, places).double()
    assert torch.allclose(likeness.diagonal(), torch.ones(len(rows), dtype=torch.float64), atol=1e-3)
    assert torch.allclose(likeness.sum(1), near.alike_among(training_set, rows), atol=1e-2)
    assert torch.allclose(likeness[5:9, 5:9], torch.ones(4, 4, dtype=torch.float64), atol=1e-3)
    few = near.likeness(training_set, rows)(places[3:5], places[4:8])
    assert torch.allclose(few.double(), likeness[3:5, 4:8], atol=1e-6)


def test_likeness_of_pairs_by_groups_and_of_other_inputs() -> None:
    training_set = make_set(noise(8, 6), torch.zeros(8).long())
    groups = torch.tensor([0, 0, 1, 1, 1, 2, 3, 4])
    rows, places = torch.tensor([1, 3, 4, 7]), torch.arange(4)
    known = NearDuplicates.of(training_set, groups).likeness(training_set, rows)(places, places)
    assert known.tolist() == [[1, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    vectors = TensorExamples(torch.randn(8, 5), torch.zeros(8).long())
    alone = NearDuplicates.of(vectors).likeness(vectors, rows)(places, places)
    assert torch.equal(alone, torch.eye(4, dtype=torch.float64))
