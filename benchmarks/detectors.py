"""Detectors beside the Adversarial Robustness Toolbox, on the same activations, in one run.

    python -m benchmarks.detectors --json [--no-write]

Activations are drawn: 10 classes of 1,000 examples with 128 features that vary unequally, and 8 % of one
class displaced, as poison is. What is timed begins with the activations of each class and ends with groups
and decisions, or with scores; the forward pass, which both need, is left out. Measured:

- activation clustering: reduction to 10 principal components, which is the toolbox's default, 2-means, and
  the decision by size and silhouette;
- spectral signatures: scores of every class;
- agreement: the adjusted Rand index of the groups, in the displaced class and on average over all (in a class
  without structure 2-means has many near-equal answers), how often the decision is the same, the largest
  relative difference of scores, and the sums of squares that 2-means leaves, theirs over ours (1 or more:
  ours are as good).
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import warnings
from typing import Any

import numpy as np
import torch
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from benchmarks.influence import RESULTS, machine, peak_bytes, say, timed
from unpoison.detectors import ActivationClustering
from unpoison.detectors._two_means import silhouette, two_means
from unpoison.detectors.spectral_signatures import spectral_scores

OURS = ActivationClustering(reduction="pca")


def activations(classes: int, examples: int, width: int) -> list[Tensor]:
    """Float32[m d] of each class; the last holds the displaced."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(0.5, -1, width)
    drawn = [torch.randn(examples, width, generator=generator) * scale for _ in range(classes)]
    drawn[-1][: examples * 8 // 100] += 4 * torch.randn(width, generator=generator) * scale.sqrt()
    return drawn


def ours(drawn: list[Tensor]) -> list[tuple[Tensor, bool]]:
    """For each class the smaller group, and whether it is taken for poison."""
    found = []
    for one in drawn:
        points = OURS.reduced(one)
        parted = two_means(points)
        assert parted is not None
        apart = silhouette(points, parted.smaller, block_bytes=OURS.block_bytes)
        small = parted.share < OURS.expected_share
        found.append((parted.smaller, small and apart > OURS.least_silhouette))
    return found


def left(points: Tensor, group: Tensor) -> float:
    """The sum of squared distances to the centres of two groups."""
    return sum(
        float((points[group == side] - points[group == side].mean(0)).square().sum())
        for side in (False, True)
    )


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run everything and return the record."""
    torch.set_num_threads(arguments.threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from art.defences.detector.poison.activation_defence import cluster_activations
        from art.defences.detector.poison.clustering_analyzer import ClusteringAnalyzer
        from art.defences.detector.poison.spectral_signature_defense import SpectralSignatureDefense

        drawn = activations(arguments.classes, arguments.examples, arguments.width)
        plain = [one.numpy() for one in drawn]

        def theirs() -> tuple[list[Any], Any]:
            groups, reduced = cluster_activations(plain, nb_dims=10, reduce="PCA")
            decided = ClusteringAnalyzer().analyze_by_silhouette_score(
                groups, reduced_activations_by_class=reduced
            )
            return groups, decided[1]

        ours(drawn[:1])  # warm-up
        seconds: dict[str, float] = {}
        seconds["activation_clustering"], mine = min(
            (timed(lambda: ours(drawn)) for _ in range(3)), key=first
        )
        say(f"ours: activation clustering {seconds['activation_clustering']:.2f} s")
        seconds["art_activation_clustering"], (groups, decided) = min(
            (timed(theirs) for _ in range(2)), key=first
        )
        say(f"toolbox: activation clustering {seconds['art_activation_clustering']:.2f} s")

        centred = [one - one.mean(0) for one in drawn]
        seconds["spectral_signatures"], scores = min(
            (timed(lambda: [spectral_scores(one) for one in drawn]) for _ in range(3)), key=first
        )
        arrays = [one.numpy() for one in centred]
        score = SpectralSignatureDefense.spectral_signature_scores
        seconds["art_spectral_signatures"], their_scores = min(
            (timed(lambda: [score(one) for one in arrays]) for _ in range(3)), key=first
        )
        say(f"spectral: {seconds['spectral_signatures']:.2f} s, {seconds['art_spectral_signatures']:.2f} s")

    rand = [
        adjusted_rand_score(np.asarray(theirs), own.numpy())
        for theirs, (own, _) in zip(groups, mine, strict=True)
    ]
    points = [OURS.reduced(one) for one in drawn]
    remaining = [
        left(one, torch.from_numpy(np.asarray(theirs) == 1)) / left(one, own)
        for one, theirs, (own, _) in zip(points, groups, mine, strict=True)
    ]
    differences = [
        float(
            (own - torch.from_numpy(np.asarray(their)).reshape(-1).double().square()).abs().max() / own.max()
        )
        for own, their in zip(scores, their_scores, strict=True)
    ]
    same = [bool(poison.any()) == suspicious for poison, (_, suspicious) in zip(decided, mine, strict=True)]
    return {
        "ratios": {
            name: seconds[f"art_{name}"] / seconds[name]
            for name in ("activation_clustering", "spectral_signatures")
        },
        "agreement": {
            "adjusted_rand_index_of_the_poisoned_class": rand[-1],
            "adjusted_rand_index_mean": sum(rand) / len(rand),
            "same_decision": sum(same) / len(same),
            "sum_of_squares_left_theirs_over_ours_least": min(remaining),
            "sum_of_squares_left_theirs_over_ours_mean": sum(remaining) / len(remaining),
            "spectral_scores_relative_difference": max(differences),
        },
        "seconds": seconds,
        "peak_bytes": {"unpoison and the toolbox": peak_bytes()},
        "work": {
            "classes": arguments.classes,
            "examples_a_class": arguments.examples,
            "features": arguments.width,
        },
        "machine": machine(arguments.threads),
    }


def first(pair: tuple[float, Any]) -> float:
    """The seconds."""
    return pair[0]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print the whole record, as one JSON object")
    parser.add_argument("--no-write", action="store_true", help="leave benchmarks/results alone")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(arguments)


def main() -> None:
    """Measure, print, and keep the record."""
    arguments = parse(None)
    record = measure(arguments)
    record["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    record["command"] = " ".join(["python -m benchmarks.detectors", *sys.argv[1:]])
    if not arguments.no_write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "detectors.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record if arguments.json else record["ratios"]))


if __name__ == "__main__":
    main()
