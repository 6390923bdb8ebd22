"""Detectors beside the Adversarial Robustness Toolbox (ART).

    python -m benchmarks.detectors [--json]

The same activations for both, drawn: 10 classes of 1,000 examples with 128 features of unequal variance, and
8 % of one class displaced, as poison is. What is timed begins with the activations of each class and ends
with groups and decisions, or with scores; the forward pass, which both need, is left out.

- activation clustering: reduction to 10 principal components, which is ART's default, 2-means, and the
  decision by size and silhouette. The 2-means differ: ours takes the best of 30 starts that are fixed, ART's
  (scikit-learn's) has one start, which is random;
- spectral signatures: scores of every class;
- agreement: the adjusted Rand index of the groups, in the displaced class and on average over all (in a class
  without structure 2-means has many near-equal answers), how often the decision is the same, the largest
  relative difference of scores, and the sums of squares that 2-means leaves, ART's over ours (1 or more: ours
  are as good).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks._harness import Bench, main
from unpoison.detectors import ActivationClustering
from unpoison.detectors._two_means import silhouette, two_means
from unpoison.detectors.spectral_signatures import spectral_scores

OURS = ActivationClustering(reduction="pca")
CLUSTERING, SPECTRAL = "activation clustering", "spectral signatures"


def activations(classes: int = 10, examples: int = 1000, width: int = 128) -> list[Tensor]:
    """Float32[m d] of each class; the last holds the displaced."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(0.5, -1, width)
    drawn = [torch.randn(examples, width, generator=generator) * scale for _ in range(classes)]
    drawn[-1][: examples * 8 // 100] += 4 * torch.randn(width, generator=generator) * scale.sqrt()
    return drawn


def clustered(drawn: list[Tensor]) -> list[tuple[Tensor, bool]]:
    """For each class the smaller group, and whether it is taken for poison."""
    found = []
    for one in drawn:
        points = OURS.reduced(one)
        parted = two_means(points)
        assert parted is not None
        separation = silhouette(points, parted.smaller, block_bytes=OURS.block_bytes)
        small = parted.share < OURS.expected_share
        found.append((parted.smaller, small and separation > OURS.min_silhouette))
    return found


def left(points: Tensor, group: Tensor) -> float:
    """The sum of squared distances to the centres of two groups."""
    parts = (points[group], points[~group])
    return sum(float((part - part.mean(0)).square().sum()) for part in parts)


def measure(bench: Bench) -> None:
    """Both methods, and how well the results agree."""
    from art.defences.detector.poison.activation_defence import cluster_activations
    from art.defences.detector.poison.clustering_analyzer import ClusteringAnalyzer
    from art.defences.detector.poison.spectral_signature_defense import SpectralSignatureDefense
    from sklearn.metrics import adjusted_rand_score

    drawn = activations()
    arrays = [one.numpy() for one in drawn]

    def toolbox() -> tuple[list[Any], Any]:
        groups, reduced = cluster_activations(arrays, nb_dims=10, reduce="PCA")
        decide = ClusteringAnalyzer().analyze_by_silhouette_score
        return groups, decide(groups, reduced_activations_by_class=reduced)[1]

    def signatures() -> list[Any]:
        score = SpectralSignatureDefense.spectral_signature_scores  # leaves the centring to its caller
        return [score(one - one.mean(0)) for one in arrays]

    sides = {"unpoison": lambda: clustered(drawn), "ART": toolbox}
    differs = "2-means: 30 fixed starts in place of one random"
    found = bench.compare(CLUSTERING, sides, differs=differs)
    mine, (groups, decided) = found["unpoison"], found["ART"]
    sides = {"unpoison": lambda: [spectral_scores(one) for one in drawn], "ART": signatures}
    scores = bench.compare(SPECTRAL, sides)
    rand, remaining, same, apart = [], [], [], []
    for place, (points, (own, poisoned)) in enumerate(zip(map(OURS.reduced, drawn), mine, strict=True)):
        theirs = torch.from_numpy(np.asarray(groups[place]) == 1)
        rand.append(adjusted_rand_score(theirs.int(), own.int()))
        remaining.append(left(points, theirs) / left(points, own))
        same.append(bool(decided[place].any()) == poisoned)
        squared = torch.from_numpy(np.asarray(scores["ART"][place])).reshape(-1).double().square()
        apart.append(float((scores["unpoison"][place] - squared).abs().max() / squared.max()))
    bench.agreement = {
        "adjusted Rand index, class with the displaced": rand[-1],
        "adjusted Rand index, mean": sum(rand) / len(rand),
        "same decision": sum(same) / len(same),
        "sum of squares left, theirs over ours, least": min(remaining),
        "sum of squares left, theirs over ours, mean": sum(remaining) / len(remaining),
        "spectral scores, relative difference": max(apart),
    }


if __name__ == "__main__":
    main(measure)
