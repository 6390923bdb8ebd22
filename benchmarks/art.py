"""Attacks beside the Adversarial Robustness Toolbox (ART); its detectors are in `benchmarks.detectors`.

    python -m benchmarks.art [--json] [--poisons 20] [--steps 50]

The same network, target and number of poisons, eps 8/255, by Adam on both sides, in whole steps over all
poisons. ART takes arrays, and gives all images back, without the places of the poisons.

- Bullseye Polytope: agreement is the distance of the poisons' mean feature from the target's, in parts of the
  target's norm; before the attack, and after it by each side, ours from 8-bit images;
- gradient matching: one start; agreement is 1 - cosine of the gradients, likewise. ART decays its step.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks._harness import Bench, main, random_images
from benchmarks._tables import Section
from unpoison import attacks, workflow
from unpoison.threats import Budget, TargetedMisclassification

BULLSEYE, MATCHING = "Bullseye Polytope", "gradient matching"
ROWS = {one: (f"{one}, a whole attack, against ART", "≥ 1x") for one in (BULLSEYE, MATCHING)}


def gradient(network: nn.Module, images: Tensor, label: int) -> Tensor:
    """Of the mean loss, in all parameters."""
    loss = nn.functional.cross_entropy(network(images), torch.full((len(images),), label))
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
    x, y, at = (examples.images / 255).numpy(), np.eye(10)[examples.labels.numpy()], target.numpy()
    loss, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(network.parameters(), lr=0.1)
    model = PyTorchClassifier(network, loss, (3, 32, 32), 10, optimizer, clip_values=(0.0, 1.0))
    common = {"budget": Budget(count=len(bases)), "surrogates": [network], "seed": 0}

    def crafted(name: str, **options: int | float | str | bool) -> Tensor:
        attack = attacks.get(name, eps=8.0, steps=steps, bases=tuple(bases.tolist()), **options)
        return workflow.craft(attack, goal, examples, **common).images / 255  # type: ignore[arg-type]

    def bullseye() -> Tensor:
        given = {"max_iter": steps, "epsilon": eps, "endtoend": False, "dropout": 0.0, "verbose": False}
        attack = BullseyePolytopeAttackPyTorch(model, at, len(network) - 2, **given)
        return torch.from_numpy(attack.poison(x[bases], y[bases])[0])

    def matching() -> Tensor:
        given = {"max_trials": 1, "max_epochs": steps, "batch_size": poisons, "verbose": 0}
        attack = GradientMatchingAttack(model, len(bases) / len(x), epsilon=eps, **given)
        made, _ = attack.poison(at, np.eye(10)[[label]], x[bases], y[bases])
        return torch.from_numpy(made)

    def off_centre(made: Tensor) -> float:
        ours, wanted = network[:-1](made.float()).mean(0), network[:-1](target)[0]
        return float((ours - wanted).norm() / wanted.norm())

    def misaligned(made: Tensor) -> float:
        wanted = gradient(network, target, label)
        return 1 - float(torch.cosine_similarity(gradient(network, made.float(), label), wanted, dim=0))

    plain = {"augmentation": "none", "restarts": 1}
    for what, ours, theirs, left in (
        (BULLSEYE, lambda: crafted("bullseye-polytope"), bullseye, off_centre),
        (MATCHING, lambda: crafted("gradient-matching", **plain), matching, misaligned),
    ):
        found = {
            "before": examples.images[bases] / 255,
            **bench.compare(what, {"unpoison": ours, "ART": theirs}),
        }
        bench.agreement |= {f"{what}, {side}": left(made) for side, made in found.items()}
    bench.work = {"poisons": len(bases), "steps": steps}


SECTION = Section.of(__name__, __doc__, ROWS)

if __name__ == "__main__":
    main(measure, threads=1, poisons=20, steps=50)
