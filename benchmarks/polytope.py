"""Convex polytope: one step of ours against one of the loop that people write, in one run on the same work.

    OMP_NUM_THREADS=1 python -m benchmarks.polytope --json

Both move the same 25 poisons around one target in the features of the same networks. The plain loop reads the
features of one poison after another, asks for each network's weights a projected-gradient solver in numpy (at
most 10,000 steps, until the weights move by less than 1e-6, a sorted projection in each), and goes back
through one poison after another. Ours reads all poisons in one batch and finds all weights on the device, in
50 accelerated steps from the last ones. Agreement is the loss at the weights found, relative to the plain
loop's: below 1 ours is nearer to the target. Prints one JSON object and keeps it as
benchmarks/results/polytope.json. About a minute.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unpoison.attacks._feature_space import Reader
from unpoison.attacks._stamping import frozen
from unpoison.attacks.convex_polytope import grams_around, nearest_weights
from unpoison.models import build

RESULTS = Path(__file__).parent / "results" / "polytope.json"
POISONS = 25
STEPS = 5
CASES = {
    "three ConvNets": ("convnet-bn",) * 3,
    "ConvNet, ResNet-20, ResNet-9": ("convnet-bn", "resnet20", "resnet9"),
}


def projected(point: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The nearest point of the simplex."""
    ordered = np.sort(point)[::-1]
    excess = (np.cumsum(ordered) - 1) / np.arange(1, len(point) + 1)
    return np.maximum(point - excess[np.nonzero(ordered > excess)[0][-1]], 0)


def solved(
    rows: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any], start: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """The weights by projected gradients, one network."""
    gram, product = rows @ rows.T, rows @ wanted
    rate = 1 / np.linalg.norm(gram, 2)
    weights = start
    for _ in range(10_000):
        moved = projected(weights - rate * (gram @ weights - product))
        if np.abs(moved - weights).max() < 1e-6:
            return moved
        weights = moved
    return weights


def losses(found: list[Tensor], wanted: list[Tensor], weights: Tensor) -> Tensor:
    """The attack's loss."""
    return torch.stack(
        [
            0.5 * (row @ mine - one).square().sum() / one.square().sum()
            for row, mine, one in zip(weights, found, wanted, strict=True)
        ]
    ).sum()


def plain(
    models: list[nn.Module], images: Tensor, wanted: list[Tensor], start: Tensor
) -> tuple[float, Tensor, Tensor]:
    """Loss, weights and slope of one step, poison by poison."""
    reader = Reader("plain", models, ())
    leaves = [image[None].clone().requires_grad_() for image in images]
    apart = [reader(leaf) for leaf in leaves]
    found = [torch.cat(parts) for parts in zip(*apart, strict=True)]
    weights = torch.stack(
        [
            torch.from_numpy(
                solved(mine.detach().double().numpy(), one.double().numpy(), row.double().numpy())
            ).float()
            for mine, one, row in zip(found, wanted, start, strict=True)
        ]
    )
    loss = losses(found, wanted, weights)
    slopes = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for leaf in leaves]
    return float(loss.detach()), weights, torch.cat(slopes)


def ours(
    models: list[nn.Module], images: Tensor, wanted: list[Tensor], start: Tensor
) -> tuple[float, Tensor, Tensor]:
    """Loss, weights and slope of one step, all at once."""
    leaf = images.clone().requires_grad_()
    found = Reader("ours", models, ())(leaf)
    weights = nearest_weights(grams_around(found, wanted), start, steps=50)
    loss = losses(found, wanted, weights)
    (slope,) = torch.autograd.grad(loss, leaf)
    return float(loss.detach()), weights, slope


def case(names: tuple[str, ...]) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of each side's steps, and the losses of ours relative to the plain loop's."""
    models = [build(name, num_classes=10, width=16, seed=number).eval() for number, name in enumerate(names)]
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(POISONS, 3, 32, 32, generator=generator)
    target = torch.rand(1, 3, 32, 32, generator=generator)
    seconds: dict[str, list[float]] = {"ours": [], "plain loop": []}
    relative = []
    with frozen(models):
        with torch.no_grad():
            wanted = [each[0] for each in Reader("wanted", models, ())(target)]
        start = {side: torch.full((len(models), POISONS), 1 / POISONS) for side in seconds}
        ours(models, images, wanted, start["ours"])  # the first step of a process is slower for everybody
        for _ in range(STEPS):
            values = {}
            for side, step in (("ours", ours), ("plain loop", plain)):
                began = time.perf_counter()
                values[side], start[side], slope = step(models, images, wanted, start[side])
                seconds[side].append(time.perf_counter() - began)
            relative.append(values["ours"] / values["plain loop"])
            # One common step, so that both meet the same poisons.
            images = (images - 0.005 * slope.sign()).clamp(0, 1)
    return seconds, relative


def measure() -> dict[str, Any]:
    """Every case."""
    ratios, agreement, every = {}, {}, {}
    for label, names in CASES.items():
        seconds, relative = case(names)
        best = {side: min(times) for side, times in seconds.items()}
        ratios[f"plain loop, {label}"] = best["plain loop"] / best["ours"]
        agreement[f"loss relative to the plain loop, {label}"] = relative
        every |= {f"a step, {side}, {label}": time for side, time in best.items()}
    return {
        "name": "polytope",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "command": "python -m benchmarks.polytope --json",
        "ratios": ratios,
        "agreement": agreement,
        "seconds": every,
        "peak_bytes": {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024},
        "poisons": POISONS,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
    }


def main() -> None:
    """Measure, keep, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON object")
    parser.add_argument("--no-write", action="store_true", help="do not keep the result")
    options = parser.parse_args()
    result = measure()
    if not options.json:
        for name, ratio in result["ratios"].items():
            print(f"{name:44s} {ratio:6.1f} times as fast")
    if not options.no_write:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
