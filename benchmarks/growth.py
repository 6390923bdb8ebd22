"""How time and memory of influence scoring grow.

    python -m benchmarks.growth [--json]

ResNet-9 of width 8 on random images of CIFAR's shape: 1,250 to 10,000 images with 50 queries, and 1 to 200
queries with 5,000 images. Each point is a process of its own, so that its peak memory is its own; memory
before the work is that of Python, torch and the images.
"""

from __future__ import annotations

import json

import torch

from benchmarks._harness import Bench, main, peak_bytes, random_images, say, timed
from benchmarks._tables import Section, points
from unpoison.influence import fit_factors, precondition, score
from unpoison.models import build
from unpoison.tasks import ClassificationTask

SIZES = [(images, 50) for images in (1250, 2500, 5000, 10000)] + [(5000, count) for count in (1, 10, 200)]
STAGES, MEMORY = ("factors", "queries made", "scores"), ("peak memory", "of it before the work")
TASK = ClassificationTask()


def point(images: int, queries: int) -> None:
    """Print time and peak memory of one size, measured in this process."""
    generator = torch.Generator().manual_seed(0)
    training_set = random_images(images, generator)
    batch = random_images(queries, generator).batch(0, queries)
    model = build("resnet9", num_classes=10, width=8, seed=0).eval()
    score(model, precondition(model, None, batch, TASK), training_set, TASK, stop=128)  # warm-up
    before = peak_bytes()
    fitting, factors = timed(lambda: fit_factors(model, training_set, TASK, seed=0))
    preparing, prepared = timed(lambda: precondition(model, factors, batch, TASK))
    scoring, _ = timed(lambda: score(model, prepared, training_set, TASK))
    print(json.dumps([[fitting, preparing, scoring], [peak_bytes(), before]]))


def measure(bench: Bench) -> None:
    """Every point in a process of its own."""
    for images, queries in SIZES[:2] if bench.options.quick else SIZES:
        taken, held = bench.apart(f"benchmarks.growth.point({images}, {queries})")
        name = f"{images:,} images, {queries} queries"
        bench.seconds[name] = dict(zip(STAGES, taken, strict=True))
        bench.peak_bytes[name] = dict(zip(MEMORY, held, strict=True))
        say(f"{name}: {bench.seconds[name]}")


SECTION = Section.of(__name__, __doc__, tables=points("size"))


if __name__ == "__main__":
    main(measure)
