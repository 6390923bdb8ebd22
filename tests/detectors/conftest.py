"""A small poisoned set and a small net that learnt it, made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional

from unpoison.attacks import BadNets
from unpoison.data import TrainingSet
from unpoison.detectors import Observation
from unpoison.influence import Factors, fit_factors
from unpoison.tasks import ClassificationTask
from unpoison.threats import Backdoor, Budget, PatchTrigger, PoisonSet
from unpoison.training import predict

SIDE, CLASSES = 8, 4


def make_set(count: int, noise: float, seed: int) -> TrainingSet:
    """Grey images: the pattern of their class, and noise."""
    patterns = torch.rand(CLASSES, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(100))
    randomness = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    pixels = 0.5 + 0.35 * (patterns[labels] - 0.5)
    pixels = pixels + noise * torch.randn(count, 1, SIDE, SIDE, generator=randomness)
    return TrainingSet((pixels.clamp(0, 1) * 255).round().byte(), labels, ("a", "b", "c", "d"), "patterns")


def make_net(seed: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * (SIDE // 2) ** 2, CLASSES),
        )


def fit(training_set: TrainingSet, *, epochs: int, seed: int) -> nn.Sequential:
    model, randomness = make_net(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    inputs, labels = training_set.batch(0, len(training_set))
    for _ in range(epochs):
        for rows in torch.randperm(len(training_set), generator=randomness).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs[rows]), labels[rows]).backward()
            optimizer.step()
    optimizer.zero_grad()
    return model.eval()


@dataclass(frozen=True, eq=False)
class Scene:
    """A poisoned set, what learnt it, fresh labelled images, and an input that it gets wrong for it."""

    clean: TrainingSet
    held_out: TrainingSet
    poisoned: TrainingSet
    poison: PoisonSet
    model: nn.Sequential
    factors: Factors
    observation: Observation
    observations: Observation


def make_scene(seed: int) -> Scene:
    clean, test = make_set(600, 0.1, seed), make_set(400, 0.1, 1000 + seed)
    goal = Backdoor(PatchTrigger.white_corner(2), source=1, target=0)
    poison = BadNets().craft(goal, clean, budget=Budget(count=30), seed=seed)
    poisoned = poison.apply(clean)
    model = fit(poisoned, epochs=30, seed=seed)
    stamped = goal.trigger.stamp(test.images[test.labels == 1])
    wrong = stamped[predict(model, stamped).argmax(1) == 0]
    assert len(wrong) >= 80
    factors = fit_factors(model, poisoned, ClassificationTask(), seed=1)
    return Scene(
        clean,
        make_set(1200, 0.3, 2000 + seed),
        poisoned,
        poison,
        model,
        factors,
        Observation(wrong[0], 0, 1),
        Observation(wrong[:3], 0, 1),
    )


@pytest.fixture(scope="session")
def scene() -> Scene:
    return make_scene(0)


@pytest.fixture(scope="session")
def make_scenes() -> Callable[[int], Scene]:
    return make_scene


@pytest.fixture(scope="session")
def natural() -> tuple[nn.Sequential, TrainingSet, TrainingSet]:
    """A net that learnt a clean set too noisy to be learnt without errors, the set, and fresh images."""
    training_set = make_set(600, 0.3, 5)
    return fit(training_set, epochs=30, seed=5), training_set, make_set(1200, 0.3, 1005)


@dataclass(frozen=True)
class Planted:
    """A set whose pixels are its features, and which of it is poison."""

    model: nn.Sequential
    training_set: TrainingSet
    poison: frozenset[int]

    @property
    def truth(self) -> torch.Tensor:
        return torch.tensor([index in self.poison for index in range(len(self.training_set))])


def make_planted(*, gap: float = 90.0, classes: int = 3, share: float = 0.1, side: int = 4) -> Planted:
    """100 examples a class, round their class's centre; a share of the last class lies `gap` (of 255) off."""
    randomness = torch.Generator().manual_seed(3)
    labels = torch.arange(100 * classes) % classes
    centres = 128 + 30 * torch.randn(classes, side * side, generator=randomness)
    pixels = centres[labels] + 8 * torch.randn(len(labels), side * side, generator=randomness)
    poison = (labels == classes - 1).nonzero()[: round(100 * share), 0]
    pixels[poison, : side * side // 2] += gap * (
        1 - 2 * (centres[classes - 1, : side * side // 2] > 128).float()
    )
    images = pixels.round().clamp(0, 255).byte().view(-1, 1, side, side)
    names = tuple("target" if label == classes - 1 else f"clean {label}" for label in range(classes))
    with torch.random.fork_rng():
        model = nn.Sequential(nn.Flatten(), nn.Identity(), nn.Linear(side * side, classes)).eval()
    chosen = frozenset(poison.tolist()) if gap else frozenset()
    return Planted(model, TrainingSet(images, labels, names, "planted"), chosen)


@pytest.fixture(scope="session")
def planted() -> Callable[..., Planted]:
    return make_planted
