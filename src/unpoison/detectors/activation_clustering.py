"""Activation clustering: the features of a poisoned class form two clusters, clean examples and poison.

Chen, Carvalho, Baracaldo, Ludwig, Edwards, Lee, Molloy and Srivastava, "Detecting Backdoor Attacks on Deep
Neural Networks by Activation Clustering" (SafeAI at AAAI 2019, arXiv 1811.03728). For each class:

1. features: the input of the network's last layer, for the examples of the class;
2. reduction to 10 dimensions by independent component analysis (or principal components);
3. 2-means;
4. decision whether the smaller cluster is poison: by relative size (at most the share of a class that may be
   poison) and by silhouette (the two clusters are separated).

Presets: `original` requires both, a silhouette above .10 and a relative size below .35 (the lower end of the
paper's range and the default of the Adversarial Robustness Toolbox); `relative-size` requires the size alone;
`smaller-cluster` takes the smaller cluster of every class. `comparison` is what the published comparison with
Delta-Influence used (notebooks of arXiv 2411.13731): 3 principal components and the smaller cluster of every
class, which flags some 40 % of any set.

Independent component analysis multiplies whitened principal components by an orthogonal matrix, to which
2-means and silhouettes are invariant. The matrix is therefore not computed, with the same result:
`reduction="ica"` means whitened components here. 2-means starts from fixed cuts in place of random centres,
so nothing is random. The paper's third decision, to retrain without a cluster and to classify it
(exclusionary reclassification), costs a training and is not implemented.

Cost: one forward pass over the set, d^2 n multiplications for d features, and n_c^2 distances in 10
dimensions for each class of n_c examples. Memory: the features of the largest class, d^2 numbers, and
`block_bytes` of distances.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from unpoison._option_checks import check_options
from unpoison.detectors._estimates import Measured
from unpoison.detectors._findings import Findings
from unpoison.detectors._methods import register
from unpoison.detectors._representations import principal
from unpoison.detectors._search import Search, Searcher
from unpoison.detectors._two_means import silhouette, two_means
from unpoison.influence import Parts
from unpoison.registry import Presets

Reduction = Literal["ica", "pca"]
Decision = Literal["silhouette", "relative-size", "smaller"]


@final
@register(
    name="activation-clustering",
    title="Activation clustering",
    summary="Flags the smaller of two clusters of a class where it is small and separated.",
    paper="Chen et al. 2019, arXiv 1811.03728",
    cost="one forward pass",
    presets=("original", "relative-size", "smaller-cluster", "comparison"),
    can_find_nothing=True,
)
@dataclass(frozen=True, kw_only=True)
class ActivationClustering(Searcher):
    """Cut each class into two clusters, and flag the smaller one where it is small and separated.

    Arguments:
        dimensions: of the reduced features.
        reduction: `ica` (whitened principal components, see above) or `pca`.
        decision: when the smaller cluster is flagged: `silhouette` requires both thresholds,
            `relative-size` the first, `smaller` none.
        expected_share: the relative size below which a cluster may be poison, in (0, 1].
        min_silhouette: the silhouette above which two clusters are separated, in [-1, 1].
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
    min_silhouette: float = 0.10
    module: str | None = None
    batch_size: int = 512
    block_bytes: int = 1 << 26

    def __post_init__(self) -> None:
        check_options(
            self.method.name,
            self,
            dimensions="[1, inf)",
            expected_share="(0, 1]",
            min_silhouette="[-1, 1]",
            batch_size="[1, inf)",
            block_bytes="[1, inf)",
        )

    def memory_needed(self, measured: Measured) -> Parts:
        """See `Detector.memory_needed`."""
        return {**measured.by_class(self), **measured.distances(self, measured.largest_class)}

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
            f"its class and the silhouette is above {self.min_silhouette:g}",
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
        return small and (self.decision == "relative-size" or separation > self.min_silhouette)
