"""Estimators by the conventions of scikit-learn: what the detectors say of a network with these features."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from unpoison import workflow
from unpoison.data import TensorExamples
from unpoison.defenses import outliers
from unpoison.errors import InputError
from unpoison.integrations import FeatureDetector, LogitOutliers

METHODS = ("activation-clustering", "spectral-signatures", "spectre", "statistical-contamination", "deep-knn")


@pytest.fixture(scope="module")
def given() -> tuple[Any, Any]:
    draws = np.random.default_rng(0)
    labels = np.arange(240) % 3
    features = draws.normal(0, 1, (240, 6)) + 4 * np.eye(6)[labels]
    features[:12, 5] += 9
    labels[:12] = 1
    return features, labels


@pytest.mark.parametrize("method", METHODS)
def test_the_estimator_says_what_the_detector_says(method: str, given: tuple[Any, Any]) -> None:
    features, labels = given
    names = np.array(["a", "b", "c"])[labels]
    fitted = FeatureDetector(method).fit(features, names)
    # A network whose last layer is given the features, behind one that hands its input on.
    network = nn.Sequential(nn.Identity(), nn.Linear(6, 3))
    examples = TensorExamples(torch.from_numpy(features.astype(np.float32)), torch.from_numpy(labels))
    expected = workflow.scan(network, examples, method=method)
    np.testing.assert_allclose(fitted.scores_, expected.scores.double().numpy())
    assert fitted.flagged_.tolist() == expected.flagged.tolist()
    assert np.flatnonzero(fitted.labels_ == -1).tolist() == sorted(expected.flagged.tolist())
    assert fitted.classes_.tolist() == ["a", "b", "c"]
    assert fitted.n_features_in_ == 6


def test_poison_is_flagged_and_conventions_hold(given: tuple[Any, Any]) -> None:
    detector = FeatureDetector("activation-clustering", options={"expected_share": 0.4})
    state = torch.random.get_rng_state()
    predicted = detector.fit_predict(*given)
    assert torch.equal(state, torch.random.get_rng_state())
    assert set(range(12)) <= set(np.flatnonzero(predicted == -1))
    assert (predicted == 1).any()
    again = clone(detector)
    assert not hasattr(again, "scores_")
    assert again.get_params() == detector.get_params()
    assert again.set_params(method="deep-knn").method == "deep-knn"
    piped = make_pipeline(StandardScaler(), clone(detector)).fit_predict(*given)
    scaled = StandardScaler().fit_transform(given[0])
    assert np.array_equal(piped, clone(detector).fit_predict(scaled, given[1]))


def test_outliers_of_logits_are_those_of_the_filter() -> None:
    logits = np.array([[9.0, 0.0]] * 40 + [[0.0, 9.0]] * 2 + [[0.0, 9.0]] * 30)
    labels = np.array([0] * 42 + [1] * 30)
    fitted = LogitOutliers().fit(logits, labels)
    expected = outliers(torch.from_numpy(logits.astype(np.float32)), torch.from_numpy(labels))
    assert np.flatnonzero(fitted.labels_ == -1).tolist() == expected.nonzero()[:, 0].tolist() == [40, 41]
    assert fitted.scores_[40] == fitted.scores_.max() > 0
    assert (LogitOutliers(min_distance=2.0).fit_predict(logits, labels) == 1).all()


@pytest.mark.parametrize(
    ("method", "change", "words"),
    [
        ("spectral-signatures", lambda x, y: (x, None), "labels are needed"),
        ("spectral-signatures", lambda x, y: (x, y[1:]), "expected numbers"),
        ("spectral-signatures", lambda x, y: (np.where(x > 5, np.nan, x), y), "not finite"),
        ("ek-fac", lambda x, y: (x, y), "wrong prediction"),
        ("no-such", lambda x, y: (x, y), "there is no detector"),
    ],
)
def test_what_cannot_be_fitted_is_refused(method: str, change: Any, words: str, given: Any) -> None:
    with pytest.raises(InputError, match=words):
        FeatureDetector(method).fit_predict(*change(*given))
