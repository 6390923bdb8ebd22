"""Gradient matching beside the public formulation.

    python -m benchmarks.gradient_matching [--json] [--poisons 500] [--restarts 2] [--device cuda]

One network, the published 500 poisons of CIFAR's shape and a few restarts. A step gives every restart the
derivative of its loss `1 - cos` by its poisons.

- ours: `Alignment`, in micro-batches, without the derivatives by the parameters;
- public: the mean loss of the whole batch, one gradient with its graph, the cosine written out, and a plain
  `backward()`, which fills in second derivatives by all parameters as well; one restart after another. Its
  copies of the poisons between memory and device, and its loader, are left out: they are not the formulation;
- agreement: the largest difference of the two derivatives over the largest derivative.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._harness import Bench, main
from unpoison.attacks._alignment import Alignment, Gradient, gradient_of, unchanged
from unpoison.models import build

STEPS = tuple((f"a step, {name}, width 16", name, 16) for name in ("convnet-bn", "resnet9"))


def public_step(
    network: nn.Module, wanted: Gradient, clean: Tensor, labels: Tensor, deltas: list[Tensor]
) -> list[Tensor]:
    """The derivatives for all restarts, one after another, each by one graph through everything."""
    slopes = []
    for delta in deltas:
        leaf = delta.clone().requires_grad_()
        loss = F.cross_entropy(network(clean + leaf), labels)
        found = torch.autograd.grad(loss, list(network.parameters()), create_graph=True)
        product = torch.zeros((), device=clean.device)
        left, right = torch.zeros_like(product), torch.zeros_like(product)
        for mine, goal in zip(found, wanted, strict=True):
            product = product + (mine * goal).sum()
            left = left + mine.pow(2).sum()
            right = right + goal.pow(2).sum()
        (1 - product / (left.sqrt() * right.sqrt())).backward()
        network.zero_grad(set_to_none=True)
        assert leaf.grad is not None
        slopes.append(leaf.grad)
    return _finished(slopes)


def our_step(
    network: nn.Module, wanted: Gradient, clean: Tensor, labels: Tensor, deltas: list[Tensor]
) -> list[Tensor]:
    """The same by `Alignment`; on a GPU the restarts go through together."""
    alignment = Alignment([network], [wanted], micro_batch=512 if clean.is_cuda else 64)
    if clean.is_cuda:
        stacked = torch.stack([clean + delta for delta in deltas])
        return _finished(
            list(alignment.differentiate_together(stacked, labels, [unchanged] * len(deltas))[1])
        )
    return [alignment.differentiate(clean + delta, labels)[1] for delta in deltas]


def _finished(slopes: list[Tensor]) -> list[Tensor]:
    if slopes[0].is_cuda:
        torch.cuda.synchronize()
    return slopes


def measure(bench: Bench) -> None:
    """A step on each network."""
    device, poisons = bench.options.device, 50 if bench.options.quick else bench.options.poisons
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(poisons, 3, 32, 32, generator=generator).to(device)
    labels = torch.full((poisons,), 3, device=device)
    deltas = [
        (torch.randn(clean.shape, generator=generator) * 8 / 255).to(device)
        for _ in range(bench.options.restarts)
    ]
    for what, name, width in STEPS:
        network = build(name, num_classes=10, width=width, seed=0).eval().to(device)
        wanted = gradient_of(network, F.cross_entropy(network(clean[:1]), torch.tensor([1], device=device)))
        work = (network, wanted, clean, labels, deltas)
        sides = {"unpoison": partial(our_step, *work), "public formulation": partial(public_step, *work)}
        found = bench.compare(what, sides)
        bench.agreement[f"{what}, relative error"] = max(
            float((a - b).abs().max() / b.abs().max())
            for a, b in zip(found["unpoison"], found["public formulation"], strict=True)
        )
    bench.work = {"poisons": poisons, "restarts": len(deltas), "device": device}


if __name__ == "__main__":
    main(measure, threads=1, poisons=500, restarts=2, device="cpu")
