"""Deep k-NN: an example whose neighbours in feature space have another label is mislabelled or poison.

Peri, Gupta, Huang, Fowl, Zhu, Feizi, Goldstein and Dickerson, "Deep k-NN Defense against Clean-label Data
Poisoning Attacks" (AROW at ECCV 2020, arXiv 1909.13374). Stages:

1. features: the input of the network's last layer, for every training example;
2. the k nearest other examples, by Euclidean distance, of each;
3. an example is removed unless its own label is the most frequent one among them.

The paper's guideline is that k be more than twice the number of poisons, so that poisons alone cannot
outvote the rest: k = 2 * expected_share * n + 1 here, with 1 % of the set as the expected share. The paper
balances unequal classes by repeating examples; that is not done here. Every example of a class with fewer
than about k / 2 examples is outvoted, so such sets need a smaller `neighbours`.

The score is the share of the neighbours with the most frequent other label minus the share with the own
label; what is above 0 is flagged, a tie is not.

Cost: one forward pass over the set, and n^2 d multiplications for d features. Memory: n d features, and
`block_bytes` of distances.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from unpoison._option_checks import check_options
from unpoison._progress import Progress
from unpoison.detectors._estimates import Measured
from unpoison.detectors._findings import Findings
from unpoison.detectors._methods import register
from unpoison.detectors._search import Search, Searcher
from unpoison.influence import Parts
from unpoison.registry import Presets


@final
@register(
    name="deep-knn",
    title="Deep k-NN",
    summary="Flags the examples whose nearest neighbours mostly have another label.",
    paper="Peri et al. 2020, arXiv 1909.13374",
    cost="one forward pass, and the distances of all pairs",
    presets=("original",),
)
@dataclass(frozen=True, kw_only=True)
class DeepKNN(Searcher):
    """Flag the examples that their nearest neighbours outvote.

    Arguments:
        expected_share: the share of the training set that may be poison, in (0, .5), which decides k.
        neighbours: k itself; odd values avoid ties.
        module: the module whose input is read; the network's last layer by default.
        batch_size: images of a forward pass.
        block_bytes: of distances at a time.
    """

    PRESETS: ClassVar[Presets] = {
        "original": {},
    }

    expected_share: float = 0.01
    neighbours: int | None = None
    module: str | None = None
    batch_size: int = 512
    block_bytes: int = 1 << 27

    def __post_init__(self) -> None:
        check_options(
            self.method.name,
            self,
            expected_share="(0, 0.5)",
            neighbours="[1, inf)",
            batch_size="[1, inf)",
            block_bytes="[1, inf)",
        )

    def memory_needed(self, measured: Measured) -> Parts:
        """See `Detector.memory_needed`."""
        rows = measured.examples
        return {**measured.features(self, rows), **measured.distances(self, rows)}

    def search(self, search: Search) -> Findings:
        """See the module's docstring."""
        reader = search.reader(self.module, self.batch_size)
        features, training_set = reader.all(), search.training_set
        count = self.count(len(features))
        own, other = neighbour_votes(
            features,
            training_set.labels.to(features.device),
            training_set.num_classes,
            count,
            block_bytes=self.block_bytes,
            progress=search.progress,
        )
        return search.findings(
            scores=(other - own) / max(count, 1),
            threshold=0.0,
            how=f"another label is more frequent among the {count} nearest examples than the own one",
            words=f"are outvoted by their {count} nearest neighbours",
            evidence={"own_votes": own, "other_votes": other},
        )

    def count(self, examples: int) -> int:
        """k for a training set of so many examples.

        >>> DeepKNN().count(5000), DeepKNN(neighbours=7).count(5)
        (101, 4)
        """
        wanted = self.neighbours
        if wanted is None:
            wanted = 2 * math.ceil(self.expected_share * examples) + 1
        return min(wanted, examples - 1)


def neighbour_votes(
    features: Tensor,
    labels: Tensor,
    classes: int,
    count: int,
    *,
    block_bytes: int,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """The labels of the `count` nearest other rows of Float[n d] `features`.

    Returns:
        Float64[n] votes for the own label, and for the most frequent other one.

    >>> points = torch.tensor([[0.0], [1.0], [2.0], [9.0]])
    >>> neighbour_votes(points, torch.tensor([0, 1, 1, 0]), 2, 2, block_bytes=64)
    (tensor([0., 1., 1., 0.], dtype=torch.float64), tensor([2., 1., 1., 2.], dtype=torch.float64))
    """
    n = len(features)
    own = torch.zeros(n, dtype=torch.float64, device=features.device)
    other = torch.zeros_like(own)
    if count < 1:
        return own, other
    # Distances are differences of inner products, which round less where the features are centred.
    features = features - features.mean(0)
    norms = features.square().sum(1)
    step = max(1, block_bytes // (2 * n * features.element_size()))
    for start in range(0, n, step):
        stop = min(start + step, n)
        # The squared norm of the row itself is the same for all of its neighbours.
        distances = torch.addmm(norms[None], features[start:stop], features.t(), alpha=-2)
        distances.diagonal(start)[: stop - start].fill_(torch.inf)
        nearest = distances.topk(count, dim=1, largest=False, sorted=False).indices
        votes = torch.zeros(stop - start, classes, dtype=torch.float64, device=features.device)
        votes.scatter_add_(1, labels[nearest], votes.new_ones(()).expand(nearest.shape))
        at_label = labels[start:stop, None]
        own[start:stop] = votes.gather(1, at_label)[:, 0]
        other[start:stop] = votes.scatter(1, at_label, -1.0).amax(1).clamp(min=0)
        if progress is not None:
            progress("neighbours", stop, n)
    return own, other
