"""Steps of gradient matching: ours against the way the public implementation formulates them.

    python -m benchmarks.gradient_matching --json [--no-write] [--poisons 500] [--restarts 2]

One trained-size network, the published 500 poisons of CIFAR's shape and a few restarts. A step gives every
restart the derivative of its loss `1 - cos` by its poisons.

- ours: `Alignment`, in micro-batches, without derivatives that nobody asked for;
- public: the mean loss of the whole batch, one gradient with its graph, the cosine written out, and a plain
  `backward()`, which fills in second derivatives by all parameters as well; one restart after another. Its
  copies of the poisons between memory and device, and its loader, are left out: they are not the formulation.

Processor seconds are compared, best of a few in turn, so that other work on the machine matters little.
`agreement` is the largest difference of the two derivatives over the largest derivative. Where a GPU is at
hand, `--device cuda` measures there by the clock. Written to benchmarks/results/gradient_matching.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unpoison._memory import peak_bytes
from unpoison.attacks._alignment import Alignment, Gradient, gradient_of, unchanged
from unpoison.models import build

RESULTS = Path(__file__).parent / "results"
NETWORKS = (("convnet-bn", 16), ("resnet9", 16))


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
        passenger: Any = 1 - product / (left.sqrt() * right.sqrt())
        passenger.backward()
        network.zero_grad(set_to_none=True)
        assert leaf.grad is not None
        slopes.append(leaf.grad)
    return slopes


def our_step(
    network: nn.Module, wanted: Gradient, clean: Tensor, labels: Tensor, deltas: list[Tensor], piece: int
) -> list[Tensor]:
    """The same by `Alignment`; on a GPU the restarts go through together."""
    alignment = Alignment([network], [wanted], micro_batch=piece)
    if clean.is_cuda:
        stacked = torch.stack([clean + delta for delta in deltas])
        return list(alignment.differentiate_together(stacked, labels, [unchanged] * len(deltas))[1])
    return [alignment.differentiate(clean + delta, labels)[1] for delta in deltas]


def timed(work: Callable[[], list[Tensor]], device: str) -> tuple[float, list[Tensor]]:
    """Processor seconds, or on a GPU seconds by the clock."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    result = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start, result


def main() -> None:
    """Measure, print one JSON object last, and keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true", help="taken for uniformity; JSON is always printed")
    parser.add_argument("--no-write", action="store_true")
    parser.add_argument("--poisons", type=int, default=500)
    parser.add_argument("--restarts", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    piece = 64 if options.device == "cpu" else 512
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(options.poisons, 3, 32, 32, generator=generator).to(options.device)
    labels = torch.full((options.poisons,), 3, device=options.device)
    deltas = [
        (torch.randn(clean.shape, generator=generator) * 8 / 255).to(options.device)
        for _ in range(options.restarts)
    ]
    ratios: dict[str, float] = {}
    seconds: dict[str, float] = {}
    agreement: dict[str, float] = {}
    for name, width in NETWORKS:
        network = build(name, num_classes=10, width=width, seed=0).eval().to(options.device)
        wanted = gradient_of(
            network, F.cross_entropy(network(clean[:1]), torch.tensor([1], device=options.device))
        )
        best = {"ours": float("inf"), "public": float("inf")}
        for _ in range(options.repeats):
            spent, theirs = timed(
                lambda: public_step(network, wanted, clean, labels, deltas),  # noqa: B023
                options.device,
            )
            best["public"] = min(best["public"], spent)
            spent, ours = timed(
                lambda: our_step(network, wanted, clean, labels, deltas, piece),  # noqa: B023
                options.device,
            )
            best["ours"] = min(best["ours"], spent)
        label = f"{name}, width {width}"
        ratios[f"public formulation, {label}"] = best["public"] / best["ours"]
        seconds |= {f"{label}: {side} a step": value for side, value in best.items()}
        agreement[label] = max(
            float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True)
        )
        print(f"{label}: {best['public'] / best['ours']:.2f}x", file=sys.stderr)
    record = {
        "ratios": ratios,
        "agreement": agreement,
        "seconds": seconds,
        "peak_bytes": {"process": peak_bytes()},
        "work": {"poisons": options.poisons, "restarts": options.restarts, "micro_batch": piece},
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "date": datetime.date.today().isoformat(),
        "command": "python -m benchmarks.gradient_matching --json",
    }
    if not options.no_write:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / "gradient_matching.json"
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
