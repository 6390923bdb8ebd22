"""Spectral signatures: a for-loop oracle, the Adversarial Robustness Toolbox, planted poison, and presets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from unpoison import detectors
from unpoison.data import TrainingSet
from unpoison.detectors import SpectralSignatures, average_precision
from unpoison.detectors._representations import Reader, principal
from unpoison.detectors.spectral_signatures import spectral_scores
from unpoison.errors import InputError


def test_scores_are_those_of_a_plain_svd() -> None:
    features = torch.randn(40, 7, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 8)
    rows = features.numpy().astype(np.float64)
    mean = rows.mean(0)
    _, _, directions = np.linalg.svd(rows - mean)
    expected = [float(np.dot(row - mean, directions[0])) ** 2 for row in rows]
    torch.testing.assert_close(spectral_scores(features), torch.tensor(expected, dtype=torch.float64))
    # More features than examples take the other way round.
    wide = features.t().contiguous()
    rows = wide.numpy().astype(np.float64)
    _, _, directions = np.linalg.svd(rows - rows.mean(0))
    projected = ((rows - rows.mean(0)) @ directions[0]) ** 2
    torch.testing.assert_close(spectral_scores(wide), torch.from_numpy(projected))


@pytest.mark.filterwarnings("ignore")
def test_the_adversarial_robustness_toolbox_agrees() -> None:
    module = pytest.importorskip("art.defences.detector.poison.spectral_signature_defense")
    features = torch.randn(60, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    features = features * torch.linspace(1, 3, 9, dtype=torch.float64)
    # It projects features that are not centred on a direction that was found on centred ones.
    theirs: Any = module.SpectralSignatureDefense.spectral_signature_scores(
        (features - features.mean(0)).numpy()
    )
    torch.testing.assert_close(
        spectral_scores(features), torch.from_numpy(np.asarray(theirs)).reshape(-1).square()
    )


def test_principal_directions_are_orthonormal_and_leave_out_what_does_not_vary() -> None:
    points = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    points = torch.cat([points, torch.zeros(30, 2), points[:, :1]], 1)
    centred = points - points.mean(0)
    variances, directions = principal(centred, 10)
    assert directions.shape == (6, 3)
    torch.testing.assert_close(
        directions.t() @ directions, torch.eye(3, dtype=torch.float64), atol=1e-9, rtol=0
    )
    torch.testing.assert_close((centred.double() @ directions).square().mean(0), variances)


def test_planted_poison_is_found(planted: Any) -> None:
    scene = planted()
    found = SpectralSignatures(expected_share=0.1).find(scene.model, scene.training_set)
    flagged = set(found.flagged.tolist())
    assert scene.poison <= flagged
    for label in range(3):
        assert sum(int(scene.training_set.labels[index]) == label for index in flagged) <= 15
    assert average_precision(found.evidence["signature"], scene.truth) > 0.95


def test_the_whole_set_rule_is_the_notebooks(planted: Any) -> None:
    scene = planted()
    found = detectors.get("spectral-signatures", preset="comparison").find(scene.model, scene.training_set)
    rows = Reader(scene.model, scene.training_set, module=None, batch_size=64).all().double().numpy()
    _, values, directions = np.linalg.svd(rows, full_matrices=False)
    kept = directions[values > 7]
    expected = np.array([np.linalg.norm(kept @ row) for row in rows])
    np.testing.assert_allclose(found.scores.numpy(), expected, rtol=1e-8)
    assert set(found.flagged.tolist()) == set(np.flatnonzero(expected > 7).tolist())


def test_nothing_is_flagged_in_small_classes() -> None:
    images = torch.randint(
        0, 256, (12, 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    labels = torch.tensor([0] * 11 + [2])
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    found = SpectralSignatures().find(model, TrainingSet(images, labels, ("a", "b", "c")))
    assert not len(found.flagged)
    assert not found.poison_found
    assert float(found.scores[-1]) == 0


@pytest.mark.parametrize("options", [{"expected_share": 0.0}, {"expected_share": 1.0}, {"multiplier": 0.0}])
def test_impossible_settings(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match="spectral-signatures"):
        SpectralSignatures(**options)  # type: ignore[arg-type]


def test_modules_by_name(planted: Any) -> None:
    scene = planted()
    by_name = SpectralSignatures(module="2").find(scene.model, scene.training_set)
    assert torch.equal(by_name.scores, SpectralSignatures().find(scene.model, scene.training_set).scores)
    with pytest.raises(InputError, match="no such module"):
        SpectralSignatures(module="5").find(scene.model, scene.training_set)
