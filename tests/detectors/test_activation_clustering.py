"""Activation clustering: 2-means and silhouettes against plain ones, planted poison, decisions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import FastICA
from sklearn.metrics import silhouette_score

from unpoison import detectors
from unpoison.detectors import ActivationClustering
from unpoison.detectors._two_means import silhouette, two_means
from unpoison.errors import InputError


def groups(seed: int, *, small: int = 12, large: int = 60, gap: float = 6.0, width: int = 5) -> torch.Tensor:
    points = torch.randn(small + large, width, generator=torch.Generator().manual_seed(seed))
    points[:small, seed % width] += gap
    return points


def inertia(points: torch.Tensor, group: torch.Tensor) -> float:
    return sum(
        float((points[group == side] - points[group == side].mean(0)).square().sum())
        for side in (False, True)
    )


@pytest.mark.parametrize("gap", [0.0, 1.5, 6.0])
@pytest.mark.parametrize("seed", range(3))
def test_two_means_is_as_good_as_many_random_restarts(seed: int, gap: float) -> None:
    points = groups(seed, gap=gap).double()
    clusters = two_means(points)
    assert clusters is not None
    theirs = KMeans(2, n_init=20, random_state=0).fit(points.numpy())
    assert inertia(points, clusters.smaller) <= 1.02 * theirs.inertia_
    total = float((points - points.mean(0)).square().sum())
    assert clusters.explained == pytest.approx(total - inertia(points, clusters.smaller))
    assert torch.equal(clusters.margin > 0, clusters.smaller)
    assert clusters.share <= 0.5
    if gap == 6.0:
        assert clusters.smaller.nonzero()[:, 0].tolist() == list(range(12))


def test_silhouettes_are_exact() -> None:
    points, group = groups(1).double(), torch.arange(72) < 20
    expected = silhouette_score(points.numpy(), group.numpy())
    for block in (1, 72 * 8 * 5, 1 << 20):
        assert silhouette(points, group, block_bytes=block) == pytest.approx(expected)
    alone = torch.arange(72) == 3
    assert silhouette(points, alone, block_bytes=1 << 20) == pytest.approx(
        silhouette_score(points.numpy(), alone.numpy())
    )
    assert silhouette(points, torch.zeros(72).bool(), block_bytes=1) == 0


def test_ica_is_a_rotation_of_what_is_clustered() -> None:
    points = groups(2, width=8)
    reduced = ActivationClustering(dimensions=4).reduced(points).numpy()
    theirs = FastICA(4, whiten="unit-variance", random_state=0, max_iter=1000, tol=0.005).fit_transform(
        points.numpy().astype(np.float64)
    )
    ours = np.linalg.norm(reduced[:, None] - reduced[None], axis=2)
    np.testing.assert_allclose(
        ours, np.linalg.norm(theirs[:, None] - theirs[None], axis=2), rtol=1e-5, atol=1e-8
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reduction", ["FastICA", "PCA"])
def test_the_adversarial_robustness_toolbox_agrees(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    defence = pytest.importorskip("art.defences.detector.poison.activation_defence")
    analyzer = pytest.importorskip("art.defences.detector.poison.clustering_analyzer").ClusteringAnalyzer()
    by_class = [groups(3, gap=12.0).numpy(), groups(4, gap=0.0).numpy()]
    # The toolbox starts its k-means once, from centres of a global generator; from some it ends elsewhere.
    monkeypatch.setattr(np.random.mtrand, "_rand", np.random.RandomState(0))
    clusters, reduced = defence.cluster_activations(
        by_class,
        nb_clusters=2,
        nb_dims=2 if reduction == "FastICA" else 4,
        reduce=reduction,
        clustering_method="KMeans",
    )
    ours = ActivationClustering(
        dimensions=2 if reduction == "FastICA" else 4, reduction="ica" if reduction == "FastICA" else "pca"
    )
    found = two_means(ours.reduced(torch.from_numpy(by_class[0])))
    assert found is not None
    theirs = np.asarray(clusters[0]) == np.bincount(clusters[0]).argmin()
    assert found.smaller.numpy().tolist() == theirs.tolist()
    report = analyzer.analyze_by_silhouette_score(clusters[:1], reduced_activations_by_class=reduced[:1])[2]
    points = ours.reduced(torch.from_numpy(by_class[0]))
    mean = silhouette(points, found.smaller, block_bytes=1 << 20)
    assert float(report["class_0"]["avg_silhouette_score"]) == pytest.approx(mean, abs=2e-3)


def test_planted_poison_is_found_and_the_other_classes_are_left_alone(planted: Any) -> None:
    scene = planted()
    for preset in ("original", "relative-size"):
        found = detectors.get("activation-clustering", preset=preset).find(scene.model, scene.training_set)
        assert scene.poison <= set(found.flagged.tolist())
    found = detectors.get("activation-clustering", preset="original").find(scene.model, scene.training_set)
    assert set(found.flagged.tolist()) == scene.poison
    assert "target" in found.summary
    first = found.evidence["silhouette"][min(scene.poison)]
    assert all(float(value) <= float(first) for value in found.evidence["silhouette"])


def test_the_smaller_cluster_rule_takes_from_every_class(planted: Any) -> None:
    scene = planted()
    for preset in ("smaller-cluster", "comparison"):
        found = detectors.get("activation-clustering", preset=preset).find(scene.model, scene.training_set)
        assert set(scene.training_set.labels[found.flagged].tolist()) == {0, 1, 2}


def test_no_poison_no_findings(planted: Any) -> None:
    scene = planted(gap=0.0)
    found = ActivationClustering().find(scene.model, scene.training_set)
    assert not found.poison_found
    assert not len(found.flagged)


@pytest.mark.parametrize(
    "options",
    [{"dimensions": 0}, {"reduction": "tsne"}, {"decision": "nosuch"}, {"expected_share": 0.0}],
)
def test_impossible_settings(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="activation-clustering"):
        ActivationClustering(**options)
