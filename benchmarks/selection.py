"""EPIC's selection beside submodlib.

    python -m benchmarks.selection [--json]

One round on 50,000 gradients of 10 classes with 10 % medoids. The gradients are drawn: logits of networks
early and late in training, some examples sure and some not, and classes that some others resemble. Both sides
get the same and give the same: which examples to keep. submodlib's clustering is called as EPIC calls it,
dense kernel, lazy greedy, class by class; then each example goes to its most similar medoid, by one call a
class, which is quicker than EPIC's own loop. It works in a process of its own, warmed up there, so that
neither's threads and memory are the other's.

- a round: all of it, and without submodlib's assignment of examples to medoids;
- agreement: the share of examples on which both decide alike;
- the kNN outlier filter, our own variant: seconds of a round, and what all its rounds cost of the time of a
  training, on images of CIFAR's shape and the `cifar10-small` recipe.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks._harness import Bench, Timed, main, random_images
from benchmarks._tables import Section
from unpoison import defenses
from unpoison.training import Recipe, train

SHARE = 0.1
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

def select(members, seconds):
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

select(np.where(labels == 0)[0][:200], {"kernel": 0.0, "greedy": 0.0, "assignment": 0.0})  # warm-up
seconds = {"kernel": 0.0, "greedy": 0.0, "assignment": 0.0}
for label in np.unique(labels):
    select(np.where(labels == label)[0], seconds)
np.savez(target, keep=keep, seconds=json.dumps(seconds))
"""


def draw(count: int, margin: float, *, classes: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits and labels as of a network that is sure of most examples and confuses some classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    resemblance = torch.randn(classes, classes, generator=generator)
    logits = 2 * torch.randn(count, classes, generator=generator) + resemblance[labels]
    logits[torch.arange(count), labels] += 1 + margin * torch.rand(count, generator=generator).sqrt()
    return logits, labels


def submodlib(logits: Tensor, labels: Tensor, threads: int) -> Timed:
    """What it keeps, and its seconds by part."""
    gradients = logits.double().softmax(1)
    gradients[torch.arange(len(labels)), labels] -= 1
    with tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory, "gradients.npz"), Path(directory, "kept.npz")
        np.savez(source, gradients=gradients.float().numpy(), labels=labels.numpy())
        command = [sys.executable, "-c", PEER, str(source), str(target), str(SHARE)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, check=True, capture_output=True, env=environment)
        with np.load(target) as kept:
            parts = json.loads(str(kept["seconds"]))
            return Timed(sum(parts.values()), (torch.from_numpy(kept["keep"]), parts))


def measure(bench: Bench) -> None:
    """Both stages, then the kNN outlier filter in a training."""
    for stage, margin in STAGES.items():
        logits, labels = draw(5000 if bench.options.quick else 50_000, margin)
        what = f"a round, {stage} in training"
        sides = {
            "unpoison": partial(defenses.isolated, logits, labels, subset_size=SHARE),
            "submodlib": partial(submodlib, logits, labels, bench.options.threads),
        }
        found = bench.compare(what, sides)
        kept, parts = found["submodlib"]
        least = bench.seconds[what]["unpoison"]["minimum"]
        bench.ratios[f"{what}, submodlib without assignment"] = (parts["kernel"] + parts["greedy"]) / least
        bench.agreement[f"same decisions, {stage}"] = float((kept == ~found["unpoison"]).float().mean())
        del bench.peak_bytes[what]["submodlib"]  # another process
        filtered = f"a round of the kNN outlier filter, {stage}"
        dropped = bench.compare(filtered, {"unpoison": partial(defenses.outliers, logits, labels)})[
            "unpoison"
        ]
        bench.work |= {
            f"accuracy, {stage}": float((logits.argmax(1) == labels).float().mean()),
            f"dropped, {stage}": int(found["unpoison"].sum()),
            f"dropped by the kNN outlier filter, {stage}": int(dropped.sum()),
        }
    training_set = random_images(500 if bench.options.quick else 5000, torch.Generator().manual_seed(0))
    defense = defenses.get("knn-outlier-filter", min_train_accuracy=0.0)
    recipe = Recipe.preset("cifar10-small", width=8, epochs=10)
    trained = train(training_set, recipe, seed=0, defense=defense)
    rounds = sum(report.seconds for report in defense.reports)
    bench.seconds |= {"a training with the kNN outlier filter": trained.seconds}
    bench.seconds |= {"all rounds of the filter in it": rounds}


ROWS = {
    f"a round, {stage} in training": (f"a round of EPIC's selection, {stage}, against submodlib", "≥ 25x")
    for stage in STAGES
}
SECTION = Section.of(__name__, __doc__, ROWS)


if __name__ == "__main__":
    main(measure)
