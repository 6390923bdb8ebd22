"""How time and memory of influence scoring grow.

    python -m benchmarks.growth [--json]

ResNet-9 of width 8 on random images of CIFAR's shape: 1,250 to 10,000 images with 50 queries, and 1 to 200
queries with 5,000 images. Each point is a process of its own, so that its peak memory is its own; memory
before the work is that of Python, torch and the images.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import torch

from benchmarks._harness import Bench, main, peak_bytes, random_images, say, timed
from benchmarks._tables import Record, Section, seconds, size, table
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
        code = f"import torch, benchmarks.growth as growth; torch.set_num_threads({bench.options.threads}); "
        command = [sys.executable, "-c", f"{code}growth.point({images}, {queries})"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        taken, held = json.loads(done.stdout)
        name = f"{images:,} images, {queries} queries"
        bench.seconds[name] = dict(zip(STAGES, taken, strict=True))
        bench.peak_bytes[name] = dict(zip(MEMORY, held, strict=True))
        say(f"{name}: {bench.seconds[name]}")


def tables(record: Record) -> Iterator[str]:
    """Every point."""
    rows = []
    for name, taken in record["seconds"].items():
        held = record["peak_bytes"][name]
        rows.append(
            [name, *(seconds(taken[part]) for part in STAGES), *(size(held[part]) for part in MEMORY)]
        )
    yield table(("size", *STAGES, *MEMORY), rows)


SECTION = Section.of(__name__, __doc__, tables=tables)


if __name__ == "__main__":
    main(measure)
