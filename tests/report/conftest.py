"""Synthetic report data of realistic shape, so that the page is tested without training anything."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from unpoison._statistics import Proportion
from unpoison.detectors import Draw
from unpoison.report import Outcome, ReportData
from unpoison.runs import RunRecord

NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
DRAWS = ("flip", "color jitter", "affine", "elastic", "blur", "invert", "swap red and green")


def blobs(count: int, shape: tuple[int, int, int], generator: np.random.Generator) -> np.ndarray:
    channels, height, width = shape
    y, x = np.mgrid[0:height, 0:width]
    centre = (
        generator.uniform(0.35, 0.65, (count, channels, 2, 1, 1)) * np.array([height, width])[:, None, None]
    )
    spread = (
        generator.uniform(0.1, 0.3, (count, channels, 2, 1, 1)) * np.array([height, width])[:, None, None]
    )
    distance = ((y - centre[:, :, 0]) / spread[:, :, 0]) ** 4 + ((x - centre[:, :, 1]) / spread[:, :, 1]) ** 4
    images = 220 * np.exp(-distance) + generator.normal(0, 6, (count, channels, height, width))
    return images.clip(0, 255).astype(np.uint8)


def report_data(
    n: int = 5_000,
    *,
    poisons: int = 75,
    truth: bool = True,
    found: bool = True,
    shape: tuple[int, int, int] = (1, 28, 28),
    names: tuple[str, ...] = NAMES,
    heavy_tails: bool = False,
    draws: int = 50,
    images: np.ndarray | None = None,
    seed: int = 0,
) -> ReportData:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, len(names), n)
    poison = np.sort(generator.choice(n, poisons, replace=False))
    target = min(8, len(names) - 1)
    labels[poison] = target
    before = generator.normal(0, 0.05, n) + 0.1 * generator.standard_t(3, n) * (labels == target)
    after = 0.3 * before + generator.normal(0, 0.03, n)
    if found:
        before[poison] = generator.normal(1.4, 0.25, poisons)
        after[poison] = generator.normal(-0.35, 0.12, poisons)
    scores = before - after
    collapses = generator.binomial(draws, 0.5, n)
    if found:
        collapses[poison] = draws - generator.binomial(draws, 0.02, poisons)
    if heavy_tails:
        before = np.sign(before) * np.expm1(np.abs(before) * 5)
        after = np.sign(after) * np.expm1(np.abs(after) * 5)
        scores = before - after
    order = np.argsort(-scores, kind="stable")
    threshold = (
        float(np.quantile(scores, 1 - 0.9 * poisons / n)) if not found else float(scores[order[poisons + 2]])
    )
    flagged = order[: poisons + 2] if found else order[:0]
    shown = order[:64]
    pictures = blobs(64, shape, generator) if images is None else images[:64]
    observation = blobs(1, shape, generator) if images is None else images[64:65]
    pictures = pictures.copy()
    stamped = np.isin(shown, poison) & found
    pictures[stamped, :, -4:-1, -4:-1] = 255
    observation = observation.copy()
    observation[..., -4:-1, -4:-1] = 255
    predicted, true_label = target, min(4, len(names) - 2)
    others = [label for label in range(len(names)) if label != predicted]
    return ReportData(
        method="delta-influence",
        poison_found=found,
        summary="77 examples lose their influence on the prediction when the image is changed and relabelled"
        if found
        else "no example has a higher score than ordinary errors give",
        class_names=names,
        labels=labels,
        scores=scores,
        flagged=flagged,
        threshold=threshold,
        threshold_how="the highest score that any of 200 clean, correctly classified points gave to any "
        "example in 99 % of cases",
        false_alarm_level=0.01,
        p_value=0.005 if found else 0.62,
        evidence={
            "influence_before": before,
            "influence_after": after,
            "collapses": collapses.astype(np.float64),
        },
        observation=observation,
        predicted=predicted,
        true_label=true_label,
        draws=tuple(Draw(DRAWS[i % len(DRAWS)], others[i % len(others)]) for i in range(draws)),
        draw_images=np.stack(
            [
                np.roll(observation[0, :, :, ::-1] if i % 2 else observation[0], i % 5, axis=-1)
                for i in range(draws)
            ]
        ),
        top_indices=shown,
        top_images=pictures,
        poison=poison if truth else None,
        poison_clean_labels=np.full(poisons, true_label) if truth else None,
        attack="badnets" if truth else None,
        average_precision=0.987 if truth else None,
        outcomes=(
            Outcome("Before healing", Proportion(861, 1000), Proportion(98, 100)),
            Outcome("After healing", Proportion(863, 1000), Proportion(1, 100)),
            Outcome("Never poisoned", Proportion(865, 1000), Proportion(1, 100)),
        )
        if found
        else (),
        configuration={"preset": "calibrated", "draws": draws, "damping": {"relative": 0.1}, "seed": 0},
        seconds={"factors": 6.2, "queries": 0.4, "scores": 11.8, "null distribution": 3.1},
        peak_bytes=1_340_000_000,
        runs=(
            (
                "demo",
                RunRecord(
                    verb="demo",
                    seed=0,
                    started="2026-11-21T10:00:00+00:00",
                    configuration={"data": "sample", "attack": "badnets", "budget": 0.015},
                    versions={"unpoison": "0.2.0", "torch": "2.13.0", "python": "3.11.2"},
                    device={"type": "cpu", "threads": 2},
                    seconds={"craft": 0.1, "train": 38.4, "trace": 21.5, "heal": 38.0},
                    code={"digest": "0" * 32, "commit": None},
                    peak_memory_bytes=1_340_000_000,
                    results={},
                    artefacts={},
                ),
            ),
        ),
    )


@pytest.fixture
def make_data() -> Callable[..., ReportData]:
    return report_data
