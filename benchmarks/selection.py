"""One round of EPIC's selection on 50,000 gradients of 10 classes: ours and submodlib, in one run.

    python -m benchmarks.selection --json [--quick] [--no-write]

The gradients are drawn: logits of networks early and late in training, some examples sure and some not, and
classes that some others resemble. Both sides get the same, and give the same thing: which examples to keep.
submodlib's clustering is called as EPIC calls it, dense kernel, lazy greedy, class by class; then each
example goes to its most similar medoid, by one call a class, which is kinder than EPIC's own loop. It works
in a process of its own, so that neither's threads and memory are the other's. Measured:

- selection: seconds of a round with 10 % medoids, and of clustering alone (kernel and greedy);
- agreement: the share of examples on which both decide alike;
- peak bytes: of our process, everything included;
- Isolation, our own variant: seconds of a round, and what all rounds of a training cost of its time, on
  images of CIFAR's shape and the `cifar10-small` recipe.

`--quick` takes a fifth of the examples; such a run is never written to the results.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.influence import RESULTS, machine, peak_bytes, random_images, say
from unpoison.defenses import Isolation, isolated, strays
from unpoison.training import Recipe, train

# How sure the networks are of the surest examples: the largest margin of the label's logit.
STAGES = {"early": 8.0, "late": 16.0}

PEER = """
import json, sys, time
import numpy as np
from submodlib import FacilityLocationFunction

source, target, share = sys.argv[1], sys.argv[2], float(sys.argv[3])
stored = np.load(source)
gradients, labels = stored["gradients"], stored["labels"]
keep = np.ones(len(labels), dtype=bool)
seconds = {"kernel": 0.0, "greedy": 0.0, "assignment": 0.0}
for label in np.unique(labels):
    members = np.where(labels == label)[0]
    points = gradients[members]
    clock = time.perf_counter()
    function = FacilityLocationFunction(n=len(points), data=points, metric="euclidean", mode="dense")
    seconds["kernel"] += time.perf_counter() - clock
    clock = time.perf_counter()
    picked = function.maximize(
        budget=int(share * len(points)), optimizer="LazyGreedy", stopIfZeroGain=False,
        stopIfNegativeGain=False, verbose=False, show_progress=False,
    )
    order = np.array([place for place, _ in picked])
    seconds["greedy"] += time.perf_counter() - clock
    clock = time.perf_counter()
    owner = np.asarray(function.sijs)[:, order].argmax(1)
    keep[members] = np.bincount(owner, minlength=len(order))[owner] > 1
    seconds["assignment"] += time.perf_counter() - clock
np.savez(target, keep=keep, seconds=json.dumps(seconds))
"""


def draw(count: int, margin: float, *, classes: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits and labels as a network gives them that is sure of most examples and takes some for others."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    resemblance = torch.randn(classes, classes, generator=generator)
    logits = 2 * torch.randn(count, classes, generator=generator) + resemblance[labels]
    logits[torch.arange(count), labels] += 1 + margin * torch.rand(count, generator=generator).sqrt()
    return logits, labels


def submodlib(logits: Tensor, labels: Tensor, share: float, threads: int) -> tuple[Tensor, dict[str, float]]:
    """What it keeps, and its seconds by part."""
    gradients = logits.double().softmax(1)
    gradients[torch.arange(len(labels)), labels] -= 1
    with tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory, "gradients.npz"), Path(directory, "kept.npz")
        np.savez(source, gradients=gradients.float().numpy(), labels=labels.numpy())
        subprocess.run(
            [sys.executable, "-c", PEER, str(source), str(target), str(share)],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        with np.load(target) as kept:
            return torch.from_numpy(kept["keep"]), json.loads(str(kept["seconds"]))


def share_of_training(images: int) -> dict[str, float]:
    """Seconds of a training under Isolation, and those of its rounds."""
    training_set = random_images(images, torch.Generator().manual_seed(0))
    recipe = Recipe.preset("cifar10-small", width=8, epochs=10)
    defense = Isolation(ready=0.0)
    trained = train(training_set, recipe, seed=0, defense=defense)
    rounds = sum(report.seconds for report in defense.reports)
    return {"training": trained.seconds, "rounds": rounds, "share": rounds / (trained.seconds - rounds)}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run everything and return the record."""
    torch.set_num_threads(arguments.threads)
    count = arguments.examples // 5 if arguments.quick else arguments.examples
    seconds: dict[str, float] = {}
    ratios: dict[str, float] = {}
    agreement: dict[str, float] = {}
    work: dict[str, Any] = {"examples": count, "classes": 10, "subset_size": arguments.share}
    ours = {}
    for warm_up in (isolated, strays):
        warm_up(*draw(2000, 8.0))
    for stage, margin in STAGES.items():
        logits, labels = draw(count, margin)
        times = []
        for _ in range(3):
            clock = time.perf_counter()
            ours[stage] = ~isolated(logits, labels, subset_size=arguments.share)
            times.append(time.perf_counter() - clock)
        seconds[f"selection_{stage}"] = min(times)
        clock = time.perf_counter()
        dropped = strays(logits, labels)
        seconds[f"isolation_{stage}"] = time.perf_counter() - clock
        work[f"accuracy_{stage}"] = float((logits.argmax(1) == labels).float().mean())
        work[f"dropped_{stage}"] = int((~ours[stage]).sum())
        work[f"dropped_by_isolation_{stage}"] = int(dropped.sum())
        say(f"ours, {stage}: {times}, isolation {seconds[f'isolation_{stage}']:.2f} s")
    peak = peak_bytes()
    for stage, margin in STAGES.items():
        logits, labels = draw(count, margin)
        kept, parts = submodlib(logits, labels, arguments.share, arguments.threads)
        own = seconds[f"selection_{stage}"]
        seconds |= {f"submodlib_{stage}_{part}": value for part, value in parts.items()}
        ratios[f"submodlib, {stage}"] = sum(parts.values()) / own
        ratios[f"submodlib without assignment, {stage}"] = (parts["kernel"] + parts["greedy"]) / own
        agreement[f"same_decisions_{stage}"] = float((kept == ours[stage]).float().mean())
        say(f"submodlib, {stage}: {parts}, agreement {agreement[f'same_decisions_{stage}']:.5f}")
    if arguments.images:
        training = share_of_training(arguments.images)
        seconds |= {f"isolation_in_{name}": training[name] for name in ("training", "rounds")}
        work["isolation_share_of_training"] = training["share"]
        work["training_images"] = arguments.images
        say(f"isolation in training: {training}")
    return {
        "ratios": ratios,
        "agreement": agreement,
        "seconds": seconds,
        "peak_bytes": {"unpoison": peak},
        "work": work,
        "machine": machine(arguments.threads),
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print the whole record, as one JSON object")
    parser.add_argument("--no-write", action="store_true", help="leave benchmarks/results alone")
    parser.add_argument("--quick", action="store_true", help="a fifth of the examples")
    parser.add_argument("--examples", type=int, default=50_000)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--images", type=int, default=5000, help="of the training; 0 leaves it out")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(arguments)


def main() -> None:
    """Measure, print, and keep the record."""
    arguments = parse(None)
    record = measure(arguments)
    record["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    record["command"] = " ".join(["python -m benchmarks.selection", *sys.argv[1:]])
    if not (arguments.no_write or arguments.quick):
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "selection.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record if arguments.json else record["ratios"]))


if __name__ == "__main__":
    main()
