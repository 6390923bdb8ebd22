"""How time and memory of influence scoring grow with the training set and with the number of queries.

    python -m benchmarks.growth --json [--no-write]

ResNet-9 of width 8 on random images of CIFAR's shape. Each point is a fresh process, so that its peak
memory is its own: 1,250 to 10,000 images with 50 queries, and 1 to 200 queries with 5,000 images. Written
to benchmarks/results/growth.json and growth.svg.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from typing import Any

IMAGES, QUERIES = (1250, 2500, 5000, 10000), (1, 10, 50, 200)
FEW_IMAGES, FEW_QUERIES = 5000, 50


def point(images: int, queries: int, width: int, threads: int) -> dict[str, Any]:
    """Time and peak memory of one size, measured in this process."""
    import torch

    from benchmarks.influence import TASK, peak_bytes, random_images, timed
    from unpoison.influence import fit_factors, precondition, score
    from unpoison.models import build

    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    training_set = random_images(images, generator)
    batch = random_images(queries, generator).batch(0, queries)
    model = build("resnet9", num_classes=10, width=width, seed=0).eval()
    score(model, precondition(model, None, batch, TASK), training_set, TASK, stop=128)  # warm-up
    before = peak_bytes()
    fitting, factors = timed(lambda: fit_factors(model, training_set, TASK, seed=0))
    preparing, prepared = timed(lambda: precondition(model, factors, batch, TASK))
    scoring, _ = timed(lambda: score(model, prepared, training_set, TASK))
    return {
        "images": images,
        "queries": queries,
        "seconds": {"factors": fitting, "queries": preparing, "scores": scoring},
        "peak_bytes": peak_bytes(),
        "peak_bytes_before": before,
    }


def plot(points: list[dict[str, Any]], path: str) -> None:
    """Seconds and megabytes against both sizes."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(8, 5.5), layout="constrained")
    for column, (key, fixed, value) in enumerate(
        (("images", "queries", FEW_QUERIES), ("queries", "images", FEW_IMAGES))
    ):
        chosen = sorted((one for one in points if one[fixed] == value), key=lambda one: one[key])
        sizes = [one[key] for one in chosen]
        for stage in ("factors", "scores"):
            axes[0, column].plot(sizes, [one["seconds"][stage] for one in chosen], "o-", label=stage)
        axes[1, column].plot(sizes, [one["peak_bytes"] / 1e6 for one in chosen], "o-", color="tab:green")
        axes[0, column].set(title=f"{value} {fixed}", ylim=(0, None))
        axes[1, column].set(xlabel=f"training {key}" if key == "images" else key, ylim=(0, None))
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("peak memory of the process, MB")
    axes[0, 0].legend()
    figure.savefig(path)


def main() -> None:
    """Measure all points, print and keep the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print the whole record, as one JSON object")
    parser.add_argument("--no-write", action="store_true", help="leave benchmarks/results alone")
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--point", type=int, nargs=2, metavar=("IMAGES", "QUERIES"), help="measure this point only"
    )
    arguments = parser.parse_args()
    if arguments.point:
        print(json.dumps(point(*arguments.point, arguments.width, arguments.threads)))
        return

    from benchmarks.influence import RESULTS, machine

    sizes = [(images, FEW_QUERIES) for images in IMAGES]
    sizes += [(FEW_IMAGES, queries) for queries in QUERIES if queries != FEW_QUERIES]
    points = []
    for images, queries in sizes:
        command = [sys.executable, "-m", "benchmarks.growth", "--point", str(images), str(queries)]
        command += ["--width", str(arguments.width), "--threads", str(arguments.threads)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        points.append(json.loads(done.stdout.splitlines()[-1]))
        if not arguments.json:
            one = points[-1]
            print(
                f"{images:6} images {queries:4} queries  {one['seconds']}  {one['peak_bytes'] / 1e6:.0f} MB"
            )
    record = {
        "ratios": {},
        "agreement": {},
        "points": points,
        "work": {"model": f"resnet9, width {arguments.width}"},
        "machine": machine(arguments.threads),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join(["python -m benchmarks.growth", *sys.argv[1:]]),
    }
    if not arguments.no_write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "growth.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        plot(points, str(RESULTS / "growth.svg"))
    if arguments.json:
        print(json.dumps(record))


if __name__ == "__main__":
    main()
