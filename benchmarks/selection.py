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
import time
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks._harness import Bench, Timed, main, random_images
from unpoison import defenses
from unpoison.training import Recipe, train

SHARE = 0.1
# How sure the networks are of the surest examples: the largest margin of the label's logit.
STAGES = {"early": 8.0, "late": 16.0}


def draw(count: int, margin: float, *, classes: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits and labels as of a network that is sure of most examples and confuses some classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    resemblance = torch.randn(classes, classes, generator=generator)
    logits = 2 * torch.randn(count, classes, generator=generator) + resemblance[labels]
    logits[torch.arange(count), labels] += 1 + margin * torch.rand(count, generator=generator).sqrt()
    return logits, labels


def submodlib(count: int, margin: float) -> None:
    """Print what submodlib drops of the same examples, and its seconds by part, measured in this process."""
    from submodlib import FacilityLocationFunction

    logits, labels = draw(count, margin)
    residuals = logits.double().softmax(1)
    residuals[torch.arange(count), labels] -= 1
    gradients, kept = residuals.float().numpy(), np.ones(count, dtype=bool)

    def select(members: np.ndarray[Any, Any]) -> tuple[float, float, float]:
        points = gradients[members]
        clock = [time.perf_counter()]
        function = FacilityLocationFunction(n=len(points), data=points, metric="euclidean", mode="dense")
        clock.append(time.perf_counter())
        picked = function.maximize(
            budget=int(SHARE * len(points)),
            optimizer="LazyGreedy",
            stopIfZeroGain=False,
            stopIfNegativeGain=False,
            verbose=False,
            show_progress=False,
        )
        order = np.array([place for place, _ in picked])
        clock.append(time.perf_counter())
        owner = np.asarray(function.sijs)[:, order].argmax(1)
        kept[members] = np.bincount(owner, minlength=len(order))[owner] > 1
        clock.append(time.perf_counter())
        kernel, greedy, assignment = np.diff(clock)
        return kernel, greedy, assignment

    classes = [(labels == label).nonzero()[:, 0].numpy() for label in labels.unique()]
    select(classes[0][:200])  # warm-up
    seconds = np.sum([select(members) for members in classes], axis=0)
    print(json.dumps([np.flatnonzero(~kept).tolist(), seconds.tolist()]))


def in_its_process(bench: Bench, count: int, margin: float) -> Timed:
    """The rows that submodlib drops, and its seconds by part."""
    dropped, seconds = bench.apart(f"benchmarks.selection.submodlib({count}, {margin})")
    return Timed(sum(seconds), (dropped, seconds))


def measure(bench: Bench) -> None:
    """Both stages, then the kNN outlier filter in a training."""
    for stage, margin in STAGES.items():
        count = 5000 if bench.options.quick else 50_000
        logits, labels = draw(count, margin)
        what = f"a round, {stage} in training"
        sides = {
            "unpoison": partial(defenses.isolated, logits, labels, subset_size=SHARE),
            "submodlib": partial(in_its_process, bench, count, margin),
        }
        found = bench.compare(what, sides)
        dropped, (kernel, greedy, _) = found["submodlib"]
        least = bench.seconds[what]["unpoison"]["minimum"]
        bench.ratios[f"{what}, submodlib without assignment"] = (kernel + greedy) / least
        theirs = torch.zeros(count, dtype=torch.bool)
        theirs[dropped] = True
        bench.agreement[f"same decisions, {stage}"] = float((theirs == found["unpoison"]).float().mean())
        del bench.peak_bytes[what]["submodlib"]  # another process
        filtered = f"a round of the kNN outlier filter, {stage}"
        outliers = bench.compare(filtered, {"unpoison": partial(defenses.outliers, logits, labels)})[
            "unpoison"
        ]
        bench.work |= {
            f"accuracy, {stage}": float((logits.argmax(1) == labels).float().mean()),
            f"dropped, {stage}": int(found["unpoison"].sum()),
            f"dropped by the kNN outlier filter, {stage}": int(outliers.sum()),
        }
    training_set = random_images(500 if bench.options.quick else 5000, torch.Generator().manual_seed(0))
    defense = defenses.get("knn-outlier-filter", min_train_accuracy=0.0)
    recipe = Recipe.preset("cifar10-small", width=8, epochs=10)
    trained = train(training_set, recipe, seed=0, defense=defense)
    rounds = sum(report.seconds for report in defense.reports)
    bench.seconds |= {"a training with the kNN outlier filter": trained.seconds}
    bench.seconds |= {"all rounds of the filter in it": rounds}


if __name__ == "__main__":
    main(measure)
