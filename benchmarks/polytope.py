"""Convex polytope beside a loop over poisons.

    python -m benchmarks.polytope [--json]

One step of both, which move the same 25 poisons around one target in the features of the same networks. The
usual loop reads the features of one poison after another and goes back through them likewise; ours takes all
in one batch.

- equal work: the loop finds the weights of the polytope as ours does, by 50 accelerated steps on the device
  from the last weights, so what is compared is the batching alone;
- another algorithm: the loop asks, for each network, a projected-gradient solver in numpy (at most 10,000
  steps, until the weights move by less than 1e-6, with a sorted projection in each), as the public code does;
- agreement: the loss at the weights found, relative to the loop's with its own solver, of each of the steps
  taken together; below 1 ours is nearer to the target.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks._harness import Bench, main
from unpoison.attacks._feature_space import FeatureReader
from unpoison.attacks._networks import frozen
from unpoison.attacks.convex_polytope import grams_around, nearest_weights
from unpoison.models import build

POISONS, STEPS = 25, 5
CASES = {
    "three ConvNets": ("convnet-bn",) * 3,
    "ConvNet, ResNet-20, ResNet-9": ("convnet-bn", "resnet20", "resnet9"),
}
EQUAL, OTHER = "a step, the same solver", "a step, its own solver"
Found = tuple[float, Tensor, Tensor]


def projected(point: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The nearest point of the simplex."""
    ordered = np.sort(point)[::-1]
    excess = (np.cumsum(ordered) - 1) / np.arange(1, len(point) + 1)
    return np.maximum(point - excess[np.nonzero(ordered > excess)[0][-1]], 0)


def solved(found: list[Tensor], wanted: list[Tensor], start: Tensor) -> Tensor:
    """The weights by projected gradients, one network after another."""
    weights = []
    for mine, one, row in zip(found, wanted, start, strict=True):
        rows, target = mine.detach().double().numpy(), one.double().numpy()
        gram, product, own = rows @ rows.T, rows @ target, row.double().numpy()
        rate = 1 / np.linalg.norm(gram, 2)
        for _ in range(10_000):
            moved = projected(own - rate * (gram @ own - product))
            if np.abs(moved - own).max() < 1e-6:
                break
            own = moved
        weights.append(torch.from_numpy(moved).float())
    return torch.stack(weights)


def accelerated(found: list[Tensor], wanted: list[Tensor], start: Tensor) -> Tensor:
    """The weights of all networks by 50 accelerated steps."""
    return nearest_weights(grams_around(found, wanted), start, steps=50)


def losses(found: list[Tensor], wanted: list[Tensor], weights: Tensor) -> Tensor:
    """The attack's loss."""
    return torch.stack(
        [
            0.5 * (row @ mine - one).square().sum() / one.square().sum()
            for row, mine, one in zip(weights, found, wanted, strict=True)
        ]
    ).sum()


def plain(models: list[nn.Module], images: Tensor, wanted: list[Tensor], start: Tensor, solve: Any) -> Found:
    """Loss, weights and slope of one step, poison by poison."""
    reader = FeatureReader("plain", models, ())
    leaves = [image[None].clone().requires_grad_() for image in images]
    apart = [reader(leaf) for leaf in leaves]
    found = [torch.cat(parts) for parts in zip(*apart, strict=True)]
    weights = solve(found, wanted, start)
    loss = losses(found, wanted, weights)
    slopes = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for leaf in leaves]
    return float(loss.detach()), weights, torch.cat(slopes)


def ours(models: list[nn.Module], images: Tensor, wanted: list[Tensor], start: Tensor) -> Found:
    """Loss, weights and slope of one step, all at once."""
    leaf = images.clone().requires_grad_()
    found = FeatureReader("ours", models, ())(leaf)
    weights = accelerated(found, wanted, start)
    loss = losses(found, wanted, weights)
    (slope,) = torch.autograd.grad(loss, leaf)
    return float(loss.detach()), weights, slope


def measure(bench: Bench) -> None:
    """Every case: the losses of a few steps taken together, then the time of the next one."""
    for case, names in CASES.items():
        models = [build(name, num_classes=10, width=16, seed=seed).eval() for seed, name in enumerate(names)]
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(POISONS, 3, 32, 32, generator=generator)
        target = torch.rand(1, 3, 32, 32, generator=generator)
        with frozen(models):
            with torch.no_grad():
                wanted = [each[0] for each in FeatureReader("wanted", models, ())(target)]
            start = torch.full((len(models), POISONS), 1 / POISONS)
            relative, weights = [], {"ours": start, "loop": start}
            for _ in range(STEPS):
                own, weights["ours"], slope = ours(models, images, wanted, weights["ours"])
                their, weights["loop"], _ = plain(models, images, wanted, weights["loop"], solved)
                relative.append(own / their)
                images = (images - 0.005 * slope.sign()).clamp(0, 1)
            mine = partial(ours, models, images, wanted, weights["ours"])
            loop = partial(plain, models, images, wanted)
            bench.compare(
                f"{EQUAL}, {case}",
                {"unpoison": mine, "loop over poisons": partial(loop, weights["ours"], accelerated)},
            )
            bench.compare(
                f"{OTHER}, {case}",
                {"unpoison": mine, "loop over poisons": partial(loop, weights["loop"], solved)},
                differs="the solver of the weights: theirs takes up to 10,000 plain steps in numpy",
            )
        bench.agreement[f"loss relative to the loop's, {case}"] = relative
    bench.work = {"poisons": POISONS}


if __name__ == "__main__":
    main(measure, threads=1)
