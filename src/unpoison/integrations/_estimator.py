"""`FeatureDetector` and `LogitOutliers`: detectors on features and logits by the conventions of scikit-learn.

>>> import numpy as np
>>> draws = np.random.default_rng(0)
>>> features = np.concatenate([draws.normal(0, 1, (95, 8)), draws.normal(6, 0.1, (5, 8))])
>>> detector = FeatureDetector("activation-clustering").fit(features, np.zeros(100))
>>> np.flatnonzero(detector.labels_ == -1).tolist()
[95, 96, 97, 98, 99]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import BaseEstimator, OutlierMixin
from torch import Tensor, nn

from unpoison import detectors, workflow
from unpoison.data import TensorExamples
from unpoison.defenses.knn_outlier_filter import KNNOutlierFilter, distances, outliers
from unpoison.errors import InputError

Array = npt.NDArray[Any]
_layer: Any = nn.utils.skip_init  # draws no random weights


@final
class FeatureDetector(OutlierMixin, BaseEstimator):  # type: ignore[misc]
    """A detector that reads the features of examples, on features of one's own.

    Arguments:
        method: a detector that `scan` takes and that reads features: activation-clustering,
            spectral-signatures, spectre, statistical-contamination, deep-knn.
        preset: its settings; the first when None.
        options: its options, beside those of the preset.
        random_state: the seed.

    After `fit(X, y)`: `scores_` Float64[n], higher is stronger evidence; `labels_` Int64[n], -1 for flagged
    examples and 1 for others; `flagged_`, their indices, the highest score first; `classes_`; `findings_`.
    """

    def __init__(
        self,
        method: str = "spectral-signatures",
        *,
        preset: str | None = None,
        options: Mapping[str, Any] | None = None,
        random_state: int = 0,
    ) -> None:
        self.method, self.preset = method, preset
        self.options, self.random_state = options, random_state

    def fit(self, X: Any, y: Any) -> FeatureDetector:
        """Score and flag examples.

        Arguments:
            X: Float[n d], the features.
            y: n labels of any kind.

        Raises:
            InputError: shapes do not fit, a feature is not finite, or the method starts from a wrong answer.
        """
        features, labels, self.classes_ = _given(X, y)
        self.n_features_in_ = features.shape[1]
        # The features of a network are the input of its last layer: this network is that layer alone.
        network: nn.Linear = _layer(nn.Linear, features.shape[1], len(self.classes_))
        nn.init.zeros_(network.weight)
        nn.init.zeros_(network.bias)
        self.findings_ = workflow.scan(
            network,
            TensorExamples(features, labels),
            method=detectors.get(self.method, preset=self.preset, **(self.options or {})),
            seed=self.random_state,
        )
        self.scores_: Array = self.findings_.scores.double().numpy()
        self.flagged_: Array = self.findings_.flagged.numpy()
        self.labels_: Array = np.where(self.findings_.mask().numpy(), -1, 1)
        return self

    def fit_predict(self, X: Any, y: Any = None) -> Array:
        """`fit`, and its `labels_`."""
        return self.fit(X, y).labels_


@final
class LogitOutliers(OutlierMixin, BaseEstimator):  # type: ignore[misc]
    """The kNN outlier filter: examples whose gradient of the logits lies far from their class.

    Arguments:
        max_fraction: of each class that may be flagged.
        neighbours: groups of up to so many examples can be outliers.
        merge: gradients within about this fraction of their length count as one.
        iqr_factor: the threshold in interquartile ranges above the upper quartile of a class.
        min_distance: no example below this distance is flagged.

    After `fit(X, y)`: `scores_` Float64[n], the distances; `labels_` Int64[n], -1 for flagged examples and 1
    for others.
    """

    def __init__(
        self,
        *,
        max_fraction: float = 0.1,
        neighbours: int = 8,
        merge: float = 0.05,
        iqr_factor: float = 1.5,
        min_distance: float = 0.05,
    ) -> None:
        self.max_fraction, self.neighbours, self.merge = max_fraction, neighbours, merge
        self.iqr_factor, self.min_distance = iqr_factor, min_distance

    def fit(self, X: Any, y: Any) -> LogitOutliers:
        """Score and flag examples.

        Arguments:
            X: Float[n classes], the logits, in eval mode and without augmentation.
            y: Int[n], the labels, numbers of columns.

        Raises:
            InputError: shapes do not fit, or a logit is not finite.
        """
        logits, _, _ = _given(X, y)
        labels = torch.as_tensor(np.asarray(y)).to(torch.int64)
        settings = KNNOutlierFilter(**self.get_params())
        out = outliers(logits, labels, **self.get_params())
        everything = torch.ones_like(labels, dtype=torch.bool)
        self.n_features_in_ = logits.shape[1]
        self.scores_: Array = distances(
            logits, labels, neighbours=settings.neighbours, merge=settings.merge, among=everything
        ).numpy()
        self.labels_: Array = np.where(out.numpy(), -1, 1)
        return self

    def fit_predict(self, X: Any, y: Any = None) -> Array:
        """`fit`, and its `labels_`."""
        return self.fit(X, y).labels_


def _given(values: Any, labels: Any) -> tuple[Tensor, Tensor, Array]:
    """Float32[n d], Int64[n] and the classes that these number."""
    if labels is None:
        raise InputError("y: poison is looked for within classes, so labels are needed")
    rows, names = np.asarray(values), np.asarray(labels)
    if rows.ndim != 2 or names.shape != rows.shape[:1] or not np.issubdtype(rows.dtype, np.number):
        raise InputError(
            f"X, y: expected numbers [n d] and n labels, found {rows.dtype} {rows.shape} and {names.shape}"
        )
    classes, numbers = np.unique(names, return_inverse=True)
    return torch.from_numpy(rows.astype(np.float32)), torch.from_numpy(numbers.astype(np.int64)), classes
