"""SPECTRE: QUE scores against their formula, the clean covariance, and poison that does not vary most."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from unpoison.data import TrainingSet
from unpoison.detectors import SpectralSignatures, Spectre, average_precision
from unpoison.detectors.spectre import que_scores, whitening_set
from unpoison.errors import InputError


def test_que_scores_are_the_papers_formula() -> None:
    points = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points[:5, 1] += 5
    clean = torch.arange(5, 50)
    scores, mean = que_scores(points, clean, 4.0)
    chosen = points[clean]
    covariance = torch.cov(chosen.t(), correction=0)
    values, vectors = torch.linalg.eigh(covariance)
    white = (points - chosen.mean(0)) @ vectors @ torch.diag(values.rsqrt())
    moment = white.t() @ white / 50
    weight = torch.matrix_exp(4 * (moment - torch.eye(4)) / (torch.linalg.matrix_norm(moment, 2) - 1))
    expected = ((white @ weight) * white).sum(1) / weight.trace()
    torch.testing.assert_close(scores, expected)
    assert mean == pytest.approx(float(expected.mean()))
    even, _ = que_scores(points, clean, 0.0)
    torch.testing.assert_close(even, white.square().mean(1))


def test_the_clean_are_found_in_spite_of_the_poison() -> None:
    points = torch.randn(200, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    points[:, 0] *= 10
    points[:10, 2] += 8
    kept = set(whitening_set(points, 185).tolist())
    assert len(kept) == 185
    assert not kept & set(range(10))


def hidden(share: float = 0.05) -> TrainingSet:
    """Three classes that vary much in one pixel; poison of the last is off, a little, in another."""
    randomness = torch.Generator().manual_seed(2)
    labels = torch.arange(600) % 3
    pixels = 128 + 4 * torch.randn(600, 16, generator=randomness)
    pixels[:, 0] += 30 * torch.randn(600, generator=randomness)
    poison = (labels == 2).nonzero()[: round(200 * share), 0]
    pixels[poison, 5] += 30
    images = pixels.round().clamp(0, 255).byte().view(-1, 1, 4, 4)
    return TrainingSet(images, labels, ("a", "b", "target"), "hidden")


def test_it_finds_what_the_direction_of_largest_variance_does_not_show(planted: Any) -> None:
    model, training_set = planted().model, hidden()
    truth = torch.zeros(600, dtype=torch.bool)
    truth[(training_set.labels == 2).nonzero()[:10, 0]] = True
    found = Spectre().find(model, training_set)
    assert set(truth.nonzero()[:, 0].tolist()) <= set(found.flagged.tolist())
    assert set(training_set.labels[found.flagged].tolist()) == {2}
    assert len(found.flagged) == 15
    assert average_precision(found.scores, truth) > 0.95
    plain = SpectralSignatures().find(model, training_set)
    assert average_precision(plain.scores, truth) < 0.2


@pytest.mark.parametrize(
    "options",
    [{"expected_share": 0.0}, {"expected_share": 0.4}, {"multiplier": 20.0}, {"max_dimensions": 0}],
)
def test_impossible_settings(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="spectre"):
        Spectre(**options)
