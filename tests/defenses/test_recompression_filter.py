"""Recompression filter: its scores and outliers, and that it drops optimised poison and keeps the rest."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from unpoison.data import TrainingSet
from unpoison.defenses import RecompressionFilter, grain, recompression_outliers, recompression_scores
from unpoison.errors import InputError
from unpoison.training import Recipe, train

RECIPE = Recipe(model="convnet-bn", width=4, epochs=4, batch_size=32, learning_rate=0.05)


def stripes(n: int = 120, channels: int = 1) -> TrainingSet:
    """Two classes of smooth images: bright on the left, or on the right."""
    labels = torch.arange(n) % 2
    ramp = torch.linspace(60, 180, 16).expand(n, channels, 16, 16).clone()
    ramp[labels == 1] = ramp[labels == 1].flip(3)
    shade = torch.randint(0, 40, (n, 1, 1, 1), generator=torch.Generator().manual_seed(0))
    return TrainingSet((ramp + shade).to(torch.uint8), labels, ("right", "left"), "stripes")


def with_noise(training_set: TrainingSet, rows: Tensor, size: int = 16) -> TrainingSet:
    """The set with the pixels of some rows changed by `size`, like a perturbation."""
    images = training_set.images.clone()
    shape = (len(rows), *images.shape[1:])
    noise = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(1)) * 2 * size - size
    images[rows] = (images[rows].int() + noise).clamp(0, 255).to(torch.uint8)
    return replace(training_set, images=images)


def test_grain_is_the_median_of_the_laplacian() -> None:
    images = torch.rand(3, 2, 7, 6, generator=torch.Generator().manual_seed(0))
    found = grain(images)
    for place in range(3):
        medians = []
        for channel in range(2):
            pixels, values = images[place, channel] * 255, []
            for row in range(5):
                for column in range(4):
                    total = sum(
                        float(pixels[row + a, column + b]) * (1, -2, 1)[a] * (1, -2, 1)[b]
                        for a in range(3)
                        for b in range(3)
                    )
                    values.append(abs(total) / 6)
            medians.append(sorted(values)[(len(values) - 1) // 2])
        assert float(found[place]) == pytest.approx(sum(medians) / 2, abs=2e-3)


def test_grain_of_tiny_and_no_images_is_nothing() -> None:
    assert grain(torch.rand(2, 1, 2, 9)).tolist() == [0.0, 0.0]
    assert grain(torch.rand(0, 3, 8, 8)).shape == (0,)


def test_outliers_are_capped_by_class() -> None:
    sums = torch.cat([torch.linspace(1, 2, 90), torch.linspace(50, 60, 10)])
    labels = torch.cat([torch.zeros(90), torch.ones(10)]).long()
    assert int(recompression_outliers(sums, labels, max_fraction=1.0).sum()) == 10
    capped = recompression_outliers(sums, labels, max_fraction=0.4).nonzero().flatten().tolist()
    assert capped == [96, 97, 98, 99]  # the farthest of their class
    assert not bool(recompression_outliers(sums, labels, max_fraction=0.0).any())
    assert not bool(recompression_outliers(torch.ones(5), torch.zeros(5, dtype=torch.int64)).any())
    assert recompression_outliers(torch.empty(0), torch.empty(0, dtype=torch.int64)).shape == (0,)


def test_the_order_of_the_examples_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    displaced, noise = torch.rand(50, 2, generator=generator), torch.rand(50, generator=generator) * 9
    labels = torch.randint(0, 3, (50,), generator=generator)
    order = torch.randperm(50, generator=generator)
    found = recompression_outliers(recompression_scores(displaced, noise), labels, iqr_factor=0.1)
    again = recompression_outliers(
        recompression_scores(displaced[order], noise[order]), labels[order], iqr_factor=0.1
    )
    assert torch.equal(found[order], again)
    assert bool(found.any())


def test_it_drops_optimised_poison_before_the_first_step() -> None:
    clean = stripes()
    start = train(clean, RECIPE, seed=0).model
    rows = torch.arange(0, 24, 2)
    poisoned = with_noise(clean, rows)
    defense = RecompressionFilter()
    trained = train(poisoned, RECIPE, seed=1, start=start, defense=defense)
    first = defense.reports[0]
    assert first.epoch == 0
    judgement = first.judge(rows)
    assert judgement.recall.rate == 1.0
    assert judgement.clean.rate < 0.2
    assert set(rows.tolist()) <= set(trained.dropped.tolist())
    assert [report.epoch for report in defense.reports] == [0]  # it is done


def test_there_is_no_round_at_a_low_training_accuracy() -> None:
    defense = RecompressionFilter(epochs=(0, 3), min_train_accuracy=0.8)
    trained = train(with_noise(stripes(), torch.arange(0, 24, 2)), RECIPE, seed=3, defense=defense)
    assert trained.history[2].accuracy > 0.8
    assert [(report.epoch, report.in_all > 0) for report in defense.reports] == [(0, False), (3, True)]


def test_images_of_two_channels_and_nets_without_a_linear_layer_are_refused() -> None:
    with pytest.raises(InputError, match="2 channels"):
        RecompressionFilter().begin(stripes(channels=2), RECIPE, seed=0)

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(1, 2, 3)

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.convolution(images).mean((2, 3))
            return logits

    with pytest.raises(InputError, match="no linear layer"):
        train(stripes(), RECIPE, seed=0, start=Pooled(), defense=RecompressionFilter())


def test_what_is_out_of_range_is_said() -> None:
    for wrong in (
        {"quality": 0},
        {"iqr_factor": -1},
        {"max_fraction": 2},
        {"min_train_accuracy": "no"},
        {"epochs": (3, 1)},
    ):
        with pytest.raises(InputError):
            RecompressionFilter(**wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="index 1; the training has diverged"):
        recompression_scores(torch.tensor([[1.0], [float("nan")]]), torch.zeros(2))
    with pytest.raises(InputError, match="expected"):
        recompression_scores(torch.zeros(3), torch.zeros(3))
    with pytest.raises(InputError, match="expected"):
        recompression_outliers(torch.zeros(3), torch.zeros(4, dtype=torch.int64))


def test_logits_alone_decide_nothing() -> None:
    with pytest.raises(InputError, match="decides by images, not by logits"):
        RecompressionFilter().select(0, torch.zeros(6, 4), torch.zeros(6, dtype=torch.int64))
