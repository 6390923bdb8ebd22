"""What a user writes for a method, here and with the Adversarial Robustness Toolbox (ART), at its shortest.

Both begin with the same network and the same bytes and end with the flagged examples or the poisons.
`benchmarks.art` runs and counts them.
"""

from dataclasses import dataclass
from typing import Any, final

import numpy as np
from art.attacks import poisoning as art_attacks
from art.defences.detector import poison as art_detectors
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

import unpoison
from unpoison import attacks, detectors
from unpoison.data import TrainingSet
from unpoison.threats import Backdoor, Budget, PatchTrigger, PoisonSet, TargetedMisclassification

SOURCE, TARGET = 0, 1
CORNER = PatchTrigger.white_corner()
SHAPE = (3, 32, 32)


@final
@dataclass(frozen=True)
class Scene:
    """What both sides begin with."""

    network: nn.Module
    examples: TrainingSet
    target: Tensor
    poisons: int
    steps: int


def clustering_here(s: Scene) -> Tensor:
    method = detectors.get("activation-clustering", preset="smaller-cluster", reduction="pca", module="8")
    return unpoison.scan(s.network, s.examples, method=method).flagged


def clustering_art(s: Scene) -> Any:
    x, y = s.examples.images.numpy() / np.float32(255), np.eye(10)[s.examples.labels]
    model = PyTorchClassifier(s.network, nn.CrossEntropyLoss(), SHAPE, 10, clip_values=(0, 1))
    detector = art_detectors.ActivationDefence(model, x, y)
    return np.array(detector.detect_poison(nb_clusters=2, nb_dims=10, reduce="PCA")[1]) == 0


def spectral_here(s: Scene) -> Tensor:
    method = detectors.get("spectral-signatures", module="8")
    return unpoison.scan(s.network, s.examples, method=method).flagged


def spectral_art(s: Scene) -> Any:
    x, y = s.examples.images.numpy() / np.float32(255), np.eye(10)[s.examples.labels]
    model = PyTorchClassifier(s.network, nn.CrossEntropyLoss(), SHAPE, 10, clip_values=(0, 1))
    detector = art_detectors.SpectralSignatureDefense(model, x, y, expected_pp_poison=0.05)
    return np.array(detector.detect_poison()[1]) == 0


def bullseye_here(s: Scene) -> PoisonSet:
    attack = attacks.get("bullseye-polytope", eps=8.0, steps=s.steps)
    goal = TargetedMisclassification(s.target, SOURCE, TARGET)
    return unpoison.craft(attack, goal, s.examples, budget=Budget(count=s.poisons), surrogates=[s.network])


def bullseye_art(s: Scene) -> Any:
    bases = s.examples.images[s.examples.labels == TARGET].numpy() / np.float32(255)
    target, eps = s.target.numpy() / np.float32(255), 8 / 255
    model = PyTorchClassifier(s.network, nn.CrossEntropyLoss(), SHAPE, 10, clip_values=(0, 1))
    make = art_attacks.BullseyePolytopeAttackPyTorch
    attack = make(model, target, "6", max_iter=s.steps, epsilon=eps, dropout=0, verbose=False)
    return attack.poison(bases, np.eye(10)[[TARGET] * len(bases)])[0]


def matching_here(s: Scene) -> PoisonSet:
    attack = attacks.get("gradient-matching", eps=8.0, steps=s.steps, restarts=1, augmentation="none")
    goal = TargetedMisclassification(s.target, SOURCE, TARGET)
    return unpoison.craft(attack, goal, s.examples, budget=Budget(count=s.poisons), surrogates=[s.network])


def matching_art(s: Scene) -> Any:
    x, y = s.examples.images.numpy() / np.float32(255), np.eye(10)[s.examples.labels]
    target, share, eps = s.target.numpy() / np.float32(255), s.poisons / len(x), 8 / 255
    model = PyTorchClassifier(s.network, nn.CrossEntropyLoss(), SHAPE, 10, clip_values=(0, 1))
    make = art_attacks.GradientMatchingAttack
    attack = make(model, share, eps, max_trials=1, max_epochs=s.steps, verbose=False)
    return attack.poison(target, np.eye(10)[[TARGET]], x, y)[0][s.examples.labels == TARGET]


def sleeper_here(s: Scene) -> PoisonSet:
    attack = attacks.get("sleeper-agent", eps=16.0, steps=s.steps, retrainings=0, augmentation="none")
    goal, budget = Backdoor(CORNER, SOURCE, TARGET), Budget(count=s.poisons // 2)
    return unpoison.craft(attack, goal, s.examples, budget=budget, surrogates=[s.network])


def sleeper_art(s: Scene) -> Any:
    x, y = s.examples.images.numpy() / np.float32(255), np.eye(10)[s.examples.labels]
    sources, own = x[s.examples.labels == SOURCE], np.flatnonzero(s.examples.labels == TARGET)
    patch, wanted = np.ones((3, 3, 3), np.float32), np.eye(10)[[TARGET] * len(sources)]
    scaling = {"clip_values": (0, 1), "preprocessing": (0, 1)}
    model = PyTorchClassifier(s.network, nn.CrossEntropyLoss(), SHAPE, 10, **scaling)
    options = {"patching_strategy": "fixed", "selection_strategy": "max-norm", "max_trials": 1, "verbose": 0}
    make = art_attacks.SleeperAgentAttack
    attack = make(model, 0.5, patch, own, 16 / 255, max_epochs=s.steps, **options)
    poisoned = attack.poison(sources, wanted, x, y, x, y)[0]
    return poisoned[own[attack.get_poison_indices()]], own[attack.get_poison_indices()]


def hidden_here(s: Scene) -> PoisonSet:
    attack = attacks.get("hidden-trigger", steps=s.steps, learning_rate=30.0)
    goal, budget = Backdoor(CORNER, SOURCE, TARGET), Budget(count=s.poisons)
    return unpoison.craft(attack, goal, s.examples, budget=budget, surrogates=[s.network])


def hidden_art(s: Scene) -> Any:
    x, y = s.examples.images.numpy() / np.float32(255), np.eye(10)[s.examples.labels]
    model = PyTorchClassifier(s.network, nn.CrossEntropyLoss(), SHAPE, 10, clip_values=(0, 1))
    corner = np.add.outer(np.arange(32) // 29, np.arange(32) // 29) == 2
    stamp = art_attacks.PoisoningAttackBackdoor(lambda images: np.where(corner, np.float32(1), images))
    ends = {"target": np.eye(10)[TARGET], "source": np.eye(10)[SOURCE], "poison_percent": 1, "verbose": False}
    options = {"learning_rate": 30.0, "stopping_threshold": 0, "max_iter": s.steps, "eps": 16 / 255}
    make = art_attacks.HiddenTriggerBackdoor
    attack = make(model, feature_layer="6", backdoor=stamp, **ends, **options)
    return attack.poison(x, y)[0]
