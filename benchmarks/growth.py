"""How time and memory of influence grow with images and queries.

    python -m benchmarks.growth [--memory 2GB] [--json]

ResNet-9 of width 8 on CIFAR's shape; each point in a process of its own. Seconds are processor time: of a
forward pass of all images, of the passes of `fit_factors`, of the eigenvectors, and of `influence_scores`
within `--memory`. "Forward passes" are the three passes in units of the first; "of a tenth" is reckoned, for
`*_examples` of a tenth.
"""

from __future__ import annotations

import json
import time
from functools import partial

import torch

from benchmarks._harness import Bench, main, peak_bytes, random_images, timed
from benchmarks._tables import generic
from unpoison.influence import fit_factors, influence_scores
from unpoison.models import build
from unpoison.tasks import ClassificationTask

POINTS = [(images, 50) for images in (1250, 2500, 5000, 10000)] + [(5000, count) for count in (1, 10, 200)]
TASK = ClassificationTask()
tables = generic


def point(images: int, queries: int, memory: str) -> None:
    """Print time and memory of one size, measured in this process."""
    train = random_images(images, torch.Generator().manual_seed(0))
    model = build("resnet9", num_classes=10, width=8, seed=0).eval()
    clock, forward, batch = time.process_time, list[float](), min(128, images // 4)
    some = train.batch(0, batch)[0].float().contiguous(memory_format=torch.channels_last)
    asked = train.at(torch.arange(queries) % images)
    stamps = {"covariance": list[float](), "eigenvalues": list[float]()}

    def told(stage: str, done: int, total: int, /, **metrics: float) -> None:
        stamps[stage].append(clock())

    def between() -> float:
        with torch.no_grad():
            forward.extend(timed(lambda: model(some), clock)[0] * images / batch for _ in range(3))
        return clock()

    begun, before = between(), peak_bytes() / 1e9
    factors = fit_factors(model, train, TASK, seed=0, progress=told, batch_size=batch)
    between()
    scores, _ = timed(lambda: influence_scores(model, factors, asked, train, TASK, memory=memory), clock)
    between()
    count, (first, *_, last) = len(stamps["eigenvalues"]), stamps["eigenvalues"]
    once, one, two = min(forward), stamps["covariance"][-1] - begun, (last - first) * count / (count - 1)
    found = {"forward": once, "covariances": one, "eigenvectors": first - two / count - begun - one}
    found |= {"eigenvalues": two, "scores": scores, "forward passes": (one + two + scores) / once}
    found |= {"of a tenth": (0.1 * (one + two) + scores) / once, "peak GB": peak_bytes() / 1e9}
    print(json.dumps({name: round(value, 3) for name, value in found.items()} | {"GB before": before}))


def measure(bench: Bench) -> None:
    """Every point in a process of its own; those that are stored stay."""
    for key in POINTS[:2] if bench.options.quick else POINTS:
        call = f"benchmarks.growth.point(*{key}, {bench.options.memory!r})"
        bench.trial(dict(zip(("images", "queries"), key, strict=True)), partial(bench.apart, call))


if __name__ == "__main__":
    main(measure, memory="2GB")
