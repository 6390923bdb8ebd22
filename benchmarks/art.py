"""Attacks beside the Adversarial Robustness Toolbox (ART); its detectors are in `benchmarks.detectors`.

    python -m benchmarks.art [--json] [--poisons 20] [--steps 50]

The same network, target, bases and steps, eps 8/255, by Adam on both sides.

- Bullseye Polytope: agreement is the distance of the poisons' mean feature from the target's, in its norm,
  before the attack and after it, ours from 8-bit images;
- gradient matching, from one start: agreement is 1 - cosine of the gradients, likewise.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks._harness import Bench, main, random_images
from benchmarks._tables import Section
from unpoison import attacks, workflow
from unpoison.threats import Budget, TargetedMisclassification

NAMES = ("Bullseye Polytope", "gradient matching")
ROWS = {one: (f"{one}, a whole attack, against ART", "≥ 1x") for one in NAMES}
SECTION = Section.of(__name__, __doc__, ROWS)


def gradient(network: nn.Module, images: Tensor, label: int) -> Tensor:
    """Of the mean loss, in all parameters."""
    loss = -network(images).log_softmax(1)[:, label].mean()
    return torch.cat([one.flatten() for one in torch.autograd.grad(loss, list(network.parameters()))])


def measure(bench: Bench) -> None:
    """Both attacks, each by both sides."""
    from art.attacks.poisoning import BullseyePolytopeAttackPyTorch, GradientMatchingAttack
    from art.estimators.classification import PyTorchClassifier

    poisons, steps = bench.options.poisons, 5 if bench.options.quick else bench.options.steps
    examples, eps, label = random_images(200, torch.Generator().manual_seed(0)), 8 / 255, 1
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(16, 32, 3))
    network = nn.Sequential(*body, nn.ReLU(), nn.AvgPool2d(5), nn.Flatten(), nn.Linear(128, 10)).eval()
    target, bases = examples.images[:1] / 255, (examples.labels == label).nonzero()[:poisons, 0]
    goal = TargetedMisclassification(examples.images[:1], int(examples.labels[0]), label)
    x, y, at = (examples.images / 255)[bases].numpy(), np.eye(10)[[label] * len(bases)], target.numpy()
    model = PyTorchClassifier(network, nn.CrossEntropyLoss(), (3, 32, 32), 10, clip_values=(0, 1))

    def crafted(name: str, **options: int | float | str | bool) -> Tensor:
        attack, budget = attacks.get(name, eps=8.0, steps=steps, **options), Budget(count=len(bases))
        return workflow.craft(attack, goal, examples, budget=budget, surrogates=[network]).images / 255

    given = {"epsilon": eps, "batch_size": len(bases), "verbose": False}
    centre = BullseyePolytopeAttackPyTorch(model, at, len(network) - 2, max_iter=steps, dropout=0, **given)
    match = GradientMatchingAttack(model, 1.0, max_trials=1, max_epochs=steps, **given)

    def off_centre(made: Tensor) -> float:
        ours, wanted = (network[:-1](one.float()).mean(0) for one in (made, target))
        return float((ours - wanted).norm() / wanted.norm())

    def misaligned(made: Tensor) -> float:
        ours, wanted = (gradient(network, one.float(), label) for one in (made, target))
        return 1 - float(torch.cosine_similarity(ours, wanted, dim=0))

    alone = partial(crafted, "gradient-matching", augmentation="none", restarts=1)
    first = (partial(crafted, "bullseye-polytope"), partial(centre.poison, x, y), off_centre)
    second = (alone, partial(match.poison, at, y[:1], x, y), misaligned)
    for what, (ours, theirs, left) in zip(NAMES, (first, second), strict=True):
        found = bench.compare(what, {"unpoison": ours, "ART": theirs})
        found["ART"], found["before"] = torch.from_numpy(found["ART"][0]), examples.images[bases] / 255
        bench.agreement |= {f"{what}, {side}": left(made) for side, made in found.items()}
    bench.work = {"poisons": len(bases), "steps": steps}


if __name__ == "__main__":
    main(measure, threads=1, poisons=20, steps=50)
