"""Activation clustering: the examples of a poisoned class fall into two groups, clean ones and poison.

Chen, Carvalho, Baracaldo, Ludwig, Edwards, Lee, Molloy and Srivastava, "Detecting Backdoor Attacks on Deep
Neural Networks by Activation Clustering" (SafeAI at AAAI 2019, arXiv 1811.03728). For each class:

1. features: the input of the network's last layer, for the examples labelled so;
2. reduction to 10 dimensions by independent component analysis (or principal components);
3. 2-means;
4. decision whether the smaller group is poison: by relative size (at most the share of a class that may be
   poison) and by silhouette (the two groups are truly apart).

Presets: `original` asks for both, a silhouette above .10 and a relative size below .35 (the smaller value of
the paper's range and the default of the Adversarial Robustness Toolbox); `relative-size` asks for the size
alone; `smaller-cluster` decides nothing and takes the smaller group of every class. `comparison` is what the
published comparison with Delta-Influence used (notebooks of arXiv 2411.13731): 3 principal components and the
smaller group of every class, which flags some 40 % of any set.

Independent component analysis turns whitened principal components by an orthogonal matrix, and neither
2-means nor silhouettes see a rotation. So the rotation is not computed, with the same result:
`reduction="ica"` means whitened components here. 2-means starts from fixed cuts in place of random centres,
so nothing is random. The paper's third decision, to retrain without a group and to classify it
(exclusionary reclassification), costs a training and is not offered.

Cost: one forward pass over the set, d^2 n multiplications for d features, and n_c^2 distances in 10
dimensions for each class of n_c examples. Memory: the features of the largest class, d^2 numbers, and
`block_bytes` of distances.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from unpoison.detectors._findings import Findings
from unpoison.detectors._methods import register
from unpoison.detectors._representations import principal
from unpoison.detectors._search import Search, Searcher
from unpoison.detectors._two_means import silhouette, two_means
from unpoison.errors import InputError
from unpoison.registry import Presets

Reduction = Literal["ica", "pca"]
Decision = Literal["silhouette", "relative-size", "smaller"]


@final
@register(
    name="activation-clustering",
    title="Activation clustering",
    summary="Parts each class in two by its features, and flags a small group that is apart.",
    paper="Chen et al. 2019, arXiv 1811.03728",
    cost="one forward pass",
    presets=("original", "relative-size", "smaller-cluster", "comparison"),
    can_find_nothing=True,
)
@dataclass(frozen=True, kw_only=True)
class ActivationClustering(Searcher):
    """Part each class in two, and flag the smaller group where it looks like poison.

    Arguments:
        dimensions: of the reduced features.
        reduction: `ica` (whitened principal components, see above) or `pca`.
        decision: when the smaller group is flagged: `silhouette` asks for both thresholds, `relative-size`
            for the first, `smaller` for none.
        expected_share: the relative size below which a group may be poison, in (0, 1].
        least_silhouette: the silhouette above which two groups are apart.
        module: the module whose input is read; the network's last layer by default.
        batch_size: images of a forward pass.
        block_bytes: of distances at a time.

    >>> from unpoison import detectors
    >>> detectors.get("activation-clustering", preset="comparison").dimensions
    3
    """

    PRESETS: ClassVar[Presets] = {
        "original": {},
        "relative-size": {"decision": "relative-size"},
        "smaller-cluster": {"decision": "smaller"},
        "comparison": {"dimensions": 3, "reduction": "pca", "decision": "smaller"},
    }

    dimensions: int = 10
    reduction: Reduction = "ica"
    decision: Decision = "silhouette"
    expected_share: float = 0.35
    least_silhouette: float = 0.10
    module: str | None = None
    batch_size: int = 512
    block_bytes: int = 1 << 26

    def __post_init__(self) -> None:
        if self.dimensions < 1:
            raise InputError(f"ActivationClustering: dimensions must be positive, found {self.dimensions}")
        for name, value, known in (
            ("reduction", self.reduction, ("ica", "pca")),
            ("decision", self.decision, ("silhouette", "relative-size", "smaller")),
        ):
            if value not in known:
                raise InputError(f"ActivationClustering: {name} must be one of {known}, found {value!r}")
        if not 0 < self.expected_share <= 1:
            raise InputError(
                f"ActivationClustering: expected_share must lie in (0, 1], found {self.expected_share}"
            )

    def search(self, search: Search) -> Findings:
        """See the module's docstring."""
        reader = search.reader(self.module, self.batch_size)
        # Below every example of a class with a suspicious group, and below the threshold.
        scores = torch.full((len(reader.training_set),), -2.0, dtype=torch.float64)
        sizes, silhouettes = torch.zeros_like(scores), torch.zeros_like(scores)
        for one in reader.by_class():
            points = self.reduced(one.values)
            clusters = two_means(points)
            if clusters is None:
                continue
            separation = silhouette(points, clusters.smaller, block_bytes=self.block_bytes)
            margin = clusters.margin.cpu()
            scores[one.indices] = margin if self._suspicious(clusters.share, separation) else margin - 2
            sizes[one.indices], silhouettes[one.indices] = clusters.share, separation
        how = {
            "silhouette": f"in the smaller cluster, where it is less than {100 * self.expected_share:g} % of "
            f"its class and the silhouette is above {self.least_silhouette:g}",
            "relative-size": f"in the smaller cluster, where it is less than {100 * self.expected_share:g} % "
            "of its class",
            "smaller": "in the smaller cluster of its class, whatever its size",
        }[self.decision]
        return search.findings(
            scores=scores,
            threshold=0.0,
            how=how,
            words="lie in a small cluster separated from their class"
            if self.decision != "smaller"
            else "lie in the smaller cluster of their class; every class has one, poisoned or not",
            evidence={"relative_size": sizes, "silhouette": silhouettes},
        )

    def reduced(self, features: Tensor) -> Tensor:
        """Float64[n k] of Float[n d] `features`: at most `dimensions` components, those that vary."""
        centred = features.double() - features.double().mean(0)
        variances, directions = principal(centred, self.dimensions)
        points = centred @ directions
        return points / variances.sqrt() if self.reduction == "ica" else points

    def _suspicious(self, share: float, separation: float) -> bool:
        if self.decision == "smaller":
            return True
        small = share < self.expected_share
        return small and (self.decision == "relative-size" or separation > self.least_silhouette)
