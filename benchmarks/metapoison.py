"""What a surrogate's epoch costs MetaPoison, spread and concentrated, and the way the public port goes about
it.

    python -m benchmarks.metapoison --json [--quick] [--no-write]

One ConvNetBN, 5,000 images of CIFAR's shape in 40 batches, 50 poisons, K = 2: the paper's quick start with
one of its 24 surrogates. Every way gives each poison one gradient in the epoch, and takes the 40 ordinary
steps:

- plain: the ordinary steps alone, by `unpoison.training`'s rules (channels last);
- spread: MetaPoison as published, poisons in the random batches where they fall;
- concentrated: MetaPoison with 12 poisons in each of a few batches;
- port: spread poisons the way the public PyTorch port formulates a step, in our words: a functional copy of
  the net whose every forward and backward pass keeps its graph, one batch after another, in the layout
  PyTorch gives by itself, and an ordinary step by `torch.optim.SGD`. The port does not put the target into
  the batch; here it does, so that the work is the same.

`agreement` compares the gradients of the port's formulation with ours on one batch. `--quick` takes a tenth
of the images and poisons; such a run is never written to the results.
"""

from __future__ import annotations

import argparse
import dataclasses
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
from torch.func import functional_call

from unpoison._memory import peak_bytes
from unpoison.attacks import MetaPoison
from unpoison.attacks._surrogates import Epoch, Surrogates, Upbringing
from unpoison.attacks._unrolled import look_ahead
from unpoison.data import TrainingSet
from unpoison.models import build
from unpoison.threats import Budget, LInf, TargetedMisclassification

RESULTS = Path(__file__).parent / "results"
STEPS = 2
CONCENTRATE = 12


def machine(threads: int) -> dict[str, Any]:
    """What the numbers were measured on."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def say(text: str) -> None:
    """A line of progress for people, apart from the result."""
    print(text, file=sys.stderr, flush=True)


def random_images(count: int) -> TrainingSet:
    """Images of CIFAR's shape: smooth noise, so that convolutions have something to see."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    images = F.interpolate(coarse, 32, mode="bilinear").mul(255).to(torch.uint8)
    return TrainingSet(images, torch.arange(count) % 10, tuple(str(label) for label in range(10)))


def seconds(work: Callable[[], Any]) -> float:
    """Processor seconds of `work`, which others on the machine do not change much."""
    start = time.process_time()
    work()
    return time.process_time() - start


class Port:
    """The same craft step, formulated as the public port does it."""

    def __init__(
        self, clean: TrainingSet, poisons: Tensor, delta: Tensor, target: Tensor, rate: float
    ) -> None:
        self.clean, self.poisons, self.delta, self.target, self.rate = clean, poisons, delta, target, rate
        self.net = build("convnet-bn", num_classes=10, seed=0, normalization=clean.channel_statistics).train()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=rate)
        self.gradient = torch.zeros_like(delta)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Float images and labels."""
        return self.clean.images[rows].float() / 255, self.clean.labels[rows]

    def look(self, rows: list[Tensor], net: nn.Module) -> Tensor:
        """The gradient of the target's loss after K steps in all poisons, by one graph through everything."""
        delta = self.delta.clone().requires_grad_()
        buffers = {name: value.clone() for name, value in net.named_buffers()}
        parameters = {name: value.detach().clone().requires_grad_() for name, value in net.named_parameters()}
        losses = []
        for depth, chosen in enumerate(rows):
            images, labels = self.batch(chosen)
            if depth == 0:
                hits, members = (chosen[:, None] == self.poisons[None]).nonzero(as_tuple=True)
                images = images.index_add(0, hits, delta[members])
            outputs = functional_call(net, {**parameters, **buffers}, (torch.cat([images, self.target]),))
            if depth:
                logits = outputs[len(chosen) :]
                rivals = logits.clone()
                rivals[:, 1] = -torch.inf
                losses.append((rivals.amax(1) - logits[:, 1]).mean())
            if depth < STEPS:
                loss = F.cross_entropy(outputs[: len(chosen)], labels)
                gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
                parameters = {
                    name: value - self.rate * gradient
                    for (name, value), gradient in zip(parameters.items(), gradients, strict=True)
                }
        (gradient,) = torch.autograd.grad(sum(losses, torch.zeros(())) / len(losses), delta)
        return gradient

    def epoch(self, rows: list[Tensor]) -> int:
        """Look ahead wherever a poison falls, and take the ordinary steps; gives the number of looks."""
        member = torch.zeros(len(self.clean), dtype=torch.bool)
        member[self.poisons] = True
        looks = 0
        for number, chosen in enumerate(rows):
            if bool(member[chosen].any()):
                further = [rows[(number + step) % len(rows)] for step in range(STEPS + 1)]
                self.gradient += self.look(further, self.net)
                looks += 1
            images, labels = self.batch(chosen)
            loss = F.cross_entropy(self.net(images), labels)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
        return looks


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run everything and return the record."""
    torch.set_num_threads(arguments.threads)
    share = 10 if arguments.quick else 1
    clean = random_images(5000 // share)
    count = 50 // share
    goal = TargetedMisclassification(random_images(5010).images[-10:-9], 0, 1)
    target = goal.images.float() / 255
    attack = MetaPoison(
        surrogates=1,
        steps=1,
        unroll=STEPS,
        lifetime=20,
        concentrate=0,
        selection="first",
        perturbation=LInf(8),
    )
    upbringing = Upbringing(
        training_set=clean, templates=(), recipe=attack.recipe, lifetime=20, pretrained=False, seed=0
    )

    def fresh() -> tuple[Surrogates, Epoch]:
        surrogates = Surrogates(upbringing, [0])
        return surrogates, Epoch(surrogates)

    def plain() -> None:
        surrogates, epoch = fresh()
        surrogates.grow(epoch)

    def craft(concentrate: int) -> None:
        # A craft of one step and one surrogate, whose pretraining is no epoch at all: its age is 0.
        dataclasses.replace(attack, concentrate=concentrate).craft(
            goal, clean, budget=Budget(count=count), seed=0
        )

    surrogates, epoch = fresh()
    rows = [part[0] for part in epoch.rows]
    poisons = (clean.labels == 1).nonzero().squeeze(1)[:count]
    rate = float(epoch.step(0).rates[0])
    delta = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 0.02
    port = Port(clean, poisons, delta, target, rate)

    # One batch both ways, from the same weights.
    number = next(place for place, chosen in enumerate(rows) if bool(torch.isin(chosen, poisons).any()))
    chosen = [rows[(number + step) % len(rows)] for step in range(STEPS + 1)]
    places, members = (chosen[0][:, None] == poisons[None]).nonzero(as_tuple=True)
    pixels = (clean.images[poisons[members]].float() / 255 + delta[members]).requires_grad_()
    first = epoch.examples(chosen[0][None], (places, pixels), epoch.draws("none"))
    later = [epoch.examples(part[None], None, epoch.draws("none")) for part in chosen[1:]]
    found = look_ahead(
        surrogates.stack,
        surrogates.parameters,
        surrogates.buffers,
        surrogates.momenta,
        [first, *later],
        target,
        lambda logits: attack.loss(goal, logits),
        epoch.step(0),
    )
    (own,) = torch.autograd.grad(found.loss.sum(), pixels)
    port.net.load_state_dict(
        {name: value[0] for name, value in (surrogates.parameters | surrogates.buffers).items()}
    )
    theirs = port.look(chosen, port.net)[members]
    agreement = float((own - theirs).abs().max() / theirs.abs().max())
    say(f"agreement: relative error {agreement:.1e}")

    times: dict[str, list[float]] = {"plain": [], "concentrated": [], "spread": [], "port": []}
    looks = 0
    for turn in range(arguments.turns + 1):  # the first warms up
        if turn == 0:
            plain()
            craft(count)
            continue
        times["plain"].append(seconds(plain))
        times["concentrated"].append(seconds(lambda: craft(CONCENTRATE)))
        times["spread"].append(seconds(lambda: craft(0)))
        start = time.process_time()
        looks = port.epoch(rows)
        times["port"].append(time.process_time() - start)
        say(", ".join(f"{name} {values[-1]:.2f} s" for name, values in times.items()))
    best = {name: min(values) for name, values in times.items()}
    return {
        "ratios": {
            "port, to concentrated": best["port"] / best["concentrated"],
            "port, to spread": best["port"] / best["spread"],
        },
        "plain_epochs": {name: best[name] / best["plain"] for name in ("concentrated", "spread", "port")},
        "agreement": {"gradient_relative_error": agreement},
        "seconds": best,
        "peak_bytes": {"all": peak_bytes()},
        "work": {
            "model": "convnet-bn",
            "images": len(clean),
            "batches": len(rows),
            "poisons": count,
            "unroll": STEPS,
            "looks_ahead": {"spread and port": looks, "concentrated": -(-count // CONCENTRATE)},
            "clock": "processor seconds, the best of the turns",
            "turns": arguments.turns,
        },
        "machine": machine(arguments.threads),
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print the whole record, as one JSON object")
    parser.add_argument("--no-write", action="store_true", help="leave benchmarks/results alone")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


def main() -> None:
    """Measure, print, and keep the record."""
    arguments = parse(None)
    record = measure(arguments)
    record["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    record["command"] = " ".join(["python -m benchmarks.metapoison", *sys.argv[1:]])
    if not (arguments.no_write or arguments.quick):
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "metapoison.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record if arguments.json else record["ratios"]))


if __name__ == "__main__":
    main()
