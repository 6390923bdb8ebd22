"""Artifact mixture: which examples were optimised as the seeds were."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from unpoison.data import TrainingSet
from unpoison.detectors.artifact_mixture import artifact_mixture, two_components

TUNED = tuple(range(0, 96, 8))  # twelve of the 96 of class 0


def smooth(count: int, channels: int, side: int) -> Tensor:
    """UInt8[n c h w] of soft shapes."""
    coarse = torch.rand(count, channels, 3, 3, generator=torch.Generator().manual_seed(0))
    soft = nn.functional.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=True)
    return (soft * 200 + 20).round().to(torch.uint8)


def scene(
    *, channels: int = 3, side: int = 12, size: int = 16, tuned: tuple[int, ...] = TUNED
) -> TrainingSet:
    """96 examples of class 0, of which some bear noise, and 48 of class 1."""
    images = smooth(144, channels, side).int()
    signs = torch.randint(0, 2, images.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    images[list(tuned)] += size * signs[list(tuned)]
    labels = torch.tensor([0] * 96 + [1] * 48)
    return TrainingSet(images.clamp(0, 255).to(torch.uint8), labels, ("a", "b"), "scene")


def network(channels: int = 3) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(128, 2),
        ).eval()


def mixture_of(
    examples: TrainingSet,
    seeds: list[int],
    *,
    channels: int = 3,
    influential: list[int] | None = None,
    size: int = 64,
    model: nn.Module | None = None,
) -> tuple[Tensor | None, Tensor]:
    """The log-odds, and Bool[n] of the examples with a label of the seeds."""
    candidates = torch.isin(examples.labels, examples.labels[seeds])
    influence = influence_of(seeds if influential is None else influential, len(examples))
    log_odds = artifact_mixture(
        network(channels) if model is None else model,
        examples,
        torch.tensor(seeds),
        candidates,
        influence,
        batch_size=size,
    )
    return log_odds, candidates


def influence_of(seeds: list[int], count: int = 144) -> Tensor:
    values = torch.randn(count, generator=torch.Generator().manual_seed(2))
    values[seeds] = torch.linspace(9, 6, len(seeds))
    return values


@pytest.mark.parametrize("channels", [1, 2, 3], ids=["grey", "no jpeg", "colour"])
def test_the_other_optimised_examples_are_found_from_a_few(channels: int) -> None:
    odds, _ = mixture_of(scene(channels=channels), list(TUNED[:5]), channels=channels, size=50)
    assert odds is not None
    named = set((odds > 0).nonzero()[:, 0].tolist())
    assert named >= set(TUNED)
    assert len(named) <= len(TUNED) + 2
    # Examples of other labels come after all candidates, in the order of influence.
    assert float(odds[96:].max()) < float(odds[:96].min())
    assert torch.equal(odds[96:].argsort(), influence_of(list(TUNED[:5]))[96:].argsort())
    assert bool(odds.isfinite().all())


def test_noise_is_enough_where_the_features_do_not_move() -> None:
    # Features of the mean colour: neither recompression nor a shift changes them much, noisy or not.
    blind = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)).eval()
    odds, _ = mixture_of(scene(), list(TUNED[:5]), model=blind)
    assert odds is not None
    assert set((odds > 0).nonzero()[:, 0].tolist()) == set(TUNED)


def test_fewer_than_five_seeds_are_joined_by_the_next_in_influence() -> None:
    seeds = list(TUNED[:5])
    whole, _ = mixture_of(scene(), seeds)
    few, _ = mixture_of(scene(), seeds[:2], influential=seeds, size=7)
    assert whole is not None
    assert few is not None
    assert torch.allclose(whole, few, atol=1e-4)


@pytest.mark.parametrize(
    ("examples", "seeds"),
    [
        (scene(), [1, 2, 3, 4, 5]),  # as smooth as the rest
        (scene(size=0), list(TUNED[:5])),
        (scene().subset(torch.tensor([0, 8, 16, *range(96, 144)])), [0, 1, 2]),  # three of their label
        (scene(), list(range(60))),  # most of their label
        (scene(side=2), list(TUNED[:5])),  # too small to have a noise level
    ],
    ids=["no optimised seed", "no optimised example", "few candidates", "most are seeds", "tiny images"],
)
def test_none_where_the_artifacts_say_nothing(examples: TrainingSet, seeds: list[int]) -> None:
    assert mixture_of(examples, seeds)[0] is None


def test_features_are_standardised_by_label() -> None:
    # Class 1 is noisy by nature; the optimised examples of class 0 are no noisier than that.
    examples = scene()
    loud = examples.images.int()
    signs = torch.randint(0, 2, loud.shape, generator=torch.Generator().manual_seed(5)) * 2 - 1
    loud[96:] += 16 * signs[96:]
    examples = replace(examples, images=loud.clamp(0, 255).to(torch.uint8))
    seeds = [*TUNED[:7], 100]
    odds, candidates = mixture_of(examples, seeds)
    assert odds is not None
    assert bool(candidates.all())
    named = set((odds > 0).nonzero()[:, 0].tolist())
    assert named >= set(TUNED)
    assert sum(index >= 96 for index in named) <= 10


def slow_two_components(points: list[list[float]], known: list[bool]) -> tuple[list[float], float]:
    """The same by densities, one example at a time."""
    rows = [torch.tensor(row, dtype=torch.float64) for row in points]
    belonging = [float(is_known) for is_known in known]
    odds, likelihood = list[float](), 0.0
    for _ in range(200):
        weights = (belonging, [1 - part for part in belonging])
        means = [
            torch.stack([part * row for part, row in zip(group, rows, strict=True)]).sum(0) / sum(group)
            for group in weights
        ]
        covariance = 0.1 * torch.eye(len(rows[0]), dtype=torch.float64)
        for group, mean in zip(weights, means, strict=True):
            for part, row in zip(group, rows, strict=True):
                covariance = covariance + part * torch.outer(row - mean, row - mean) / len(rows)
        normals = [torch.distributions.MultivariateNormal(mean, covariance) for mean in means]
        share = min(sum(belonging) / len(rows), 0.5)
        densities = [
            (normal.log_prob(torch.stack(rows)) + math.log(part)).tolist()  # type: ignore[no-untyped-call]
            for normal, part in zip(normals, (share, 1 - share), strict=True)
        ]
        pairs = list(zip(*densities, strict=True))
        odds = [one - other for one, other in pairs]
        likelihood = sum(
            one if is_known else math.log(math.exp(one) + math.exp(other))
            for (one, other), is_known in zip(pairs, known, strict=True)
        )
        belonging = [
            1.0 if is_known else float(torch.tensor(value).sigmoid())
            for value, is_known in zip(odds, known, strict=True)
        ]
    return odds, likelihood


@pytest.mark.parametrize("seed", range(3))
def test_the_mixture_is_that_of_a_slow_computation(seed: int) -> None:
    randomness = torch.Generator().manual_seed(seed)
    points = torch.randn(24, 2, generator=randomness, dtype=torch.float64)
    points[:8] += 3
    known = torch.zeros(24, dtype=torch.bool)
    known[:3] = True
    found = two_components(points, known, known.double())
    slow, slow_likelihood = slow_two_components(points.tolist(), known.tolist())
    assert torch.allclose(found.log_odds, torch.tensor(slow, dtype=torch.float64), atol=1e-3)
    # The slow computation includes the constant of the normal density.
    assert found.likelihood == pytest.approx(slow_likelihood + 24 * math.log(2 * math.pi), abs=1e-3)
