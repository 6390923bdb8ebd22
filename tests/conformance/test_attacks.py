"""What every attack promises, asked of all of them: one table, no attack exempt."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from unpoison import attacks
from unpoison.attacks import Attack
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.threats import Backdoor, Budget, Goal, PatchTrigger, PoisonSet, TargetedMisclassification

# What an attack needs to be quick; everything else is its default.
QUICK: dict[str, Attack] = {"badnets": attacks.BadNets()}

GOALS: dict[str, Callable[[TrainingSet], Goal]] = {
    "backdoor": lambda clean: Backdoor(PatchTrigger.white_corner(2), source=1, target=0),
    "targeted-misclassification": lambda clean: TargetedMisclassification(clean.images[:1], 1, 0),
}


def make_set(*, n: int, channels: int, classes: int, side: int, seed: int = 0) -> TrainingSet:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 200, (n, channels, side, side), dtype=torch.uint8, generator=generator)
    labels = torch.arange(n) % classes
    return TrainingSet(images, labels, tuple(f"class {label}" for label in range(classes)), "drawn")


SETS = {
    "colour": make_set(n=60, channels=3, classes=3, side=8),
    "grey": make_set(n=60, channels=1, classes=3, side=9),
    "two classes": make_set(n=40, channels=3, classes=2, side=8),
    "seventeen classes": make_set(n=170, channels=1, classes=17, side=8),
    "tiny": make_set(n=4, channels=3, classes=2, side=4),
}

CASES = [
    pytest.param(name, kind, which, id=f"{name}-{kind}-{which}")
    for name in attacks.names()
    for kind in attacks.describe(name).goals
    for which in SETS
]


def surrogate(clean: TrainingSet) -> nn.Module:
    channels, height, width = clean.image_shape
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(channels, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * height * width, clean.num_classes),
        )


def craft(
    name: str, kind: str, clean: TrainingSet, *, budget: Budget | None = None, seed: int = 5
) -> PoisonSet:
    return QUICK[name].craft(
        GOALS[kind](clean), clean, budget=budget or Budget(share=0.05), surrogate=surrogate(clean), seed=seed
    )


@pytest.mark.parametrize(("name", "kind", "which"), CASES)
def test_the_budget_is_kept_and_used(name: str, kind: str, which: str) -> None:
    clean = SETS[which]
    assert len(craft(name, kind, clean)) == Budget(share=0.05).count_in(len(clean))
    assert len(craft(name, kind, clean, budget=Budget(count=2))) == 2


@pytest.mark.parametrize(("name", "kind", "which"), CASES)
def test_indices_are_honest(name: str, kind: str, which: str) -> None:
    clean = SETS[which]
    made = craft(name, kind, clean)
    poisoned = made.apply(clean)
    differs = (poisoned.images != clean.images).flatten(1).any(1) | (poisoned.labels != clean.labels)
    assert torch.equal(differs, made.membership(len(clean)))


@pytest.mark.parametrize(("name", "kind", "which"), CASES)
def test_labels_are_as_promised(name: str, kind: str, which: str) -> None:
    clean = SETS[which]
    made = craft(name, kind, clean)
    assert torch.equal(made.clean_labels, clean.labels[made.indices])
    if attacks.describe(name).labels == "clean":
        assert torch.equal(made.given_labels, made.clean_labels)
    else:
        assert bool((made.given_labels != made.clean_labels).all())


@pytest.mark.parametrize(("name", "kind", "which"), CASES)
def test_changes_are_as_stated(name: str, kind: str, which: str) -> None:
    clean = SETS[which]
    made = craft(name, kind, clean)
    change = (made.images.double() - clean.images[made.indices].double()).flatten(1)
    assert torch.equal(made.linf, change.abs().amax(1).float())
    assert torch.allclose(made.l2, change.norm(dim=1).float())


@pytest.mark.parametrize(("name", "kind", "which"), CASES)
def test_the_seed_decides(name: str, kind: str, which: str) -> None:
    clean = SETS[which]
    before = torch.random.get_rng_state()
    first, second = craft(name, kind, clean), craft(name, kind, clean)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.indices, second.indices)
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.given_labels, second.given_labels)
    assert first.seed == 5
    others = [craft(name, kind, clean, seed=seed) for seed in range(6, 14)]
    assert any(
        not torch.equal(first.indices, other.indices) or not torch.equal(first.images, other.images)
        for other in others
    )


@pytest.mark.parametrize(("name", "kind", "which"), CASES)
def test_nothing_given_is_changed(name: str, kind: str, which: str) -> None:
    clean = SETS[which]
    images, labels = clean.images.clone(), clean.labels.clone()
    network = surrogate(clean).train()
    network[0].weight.requires_grad_(False)  # type: ignore[union-attr, index]
    state = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        QUICK[name].craft(GOALS[kind](clean), clean, budget=Budget(count=1), surrogate=network, seed=0)
    assert torch.equal(clean.images, images)
    assert torch.equal(clean.labels, labels)
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert [module.training for module in network.modules()] == [True] * 6
    assert [parameter.requires_grad for parameter in network.parameters()] == [False, *[True] * 5]
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize(("name", "kind", "which"), CASES)
def test_saved_and_loaded_is_the_same_with_the_same_success(
    name: str, kind: str, which: str, tmp_path: Path
) -> None:
    clean = SETS[which]
    made = craft(name, kind, clean)
    made.save(tmp_path / "poison")
    loaded = PoisonSet.load(tmp_path / "poison")
    assert loaded.apply(clean).fingerprint == made.apply(clean).fingerprint
    assert loaded.configuration == made.configuration
    assert loaded.attack == name
    model = surrogate(clean)
    assert loaded.goal.success(model, clean) == made.goal.success(model, clean)


@pytest.mark.parametrize("name", attacks.names())
def test_goals_that_it_does_not_serve_are_refused(name: str) -> None:
    clean = SETS["colour"]
    served = attacks.describe(name).goals
    for kind, goal in GOALS.items():
        if kind not in served:
            with pytest.raises(InputError) as error:
                QUICK[name].craft(goal(clean), clean, budget=Budget(count=1), seed=0)
            assert kind in str(error.value)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", attacks.names())
def test_a_budget_that_does_not_fit_is_refused_with_what_would(name: str) -> None:
    clean = SETS["colour"]
    for kind in attacks.describe(name).goals:
        with pytest.raises(InputError) as error:
            craft(name, kind, clean, budget=Budget(count=61))
        assert "61" in str(error.value)
        assert "60" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", attacks.names())
def test_it_is_a_final_frozen_dataclass_described_by_a_card(name: str) -> None:
    kind = attacks.get(name)
    assert issubclass(kind, Attack)
    assert not inspect.isabstract(kind)
    assert getattr(kind, "__final__", False)
    assert dataclasses.is_dataclass(kind)
    assert isinstance(QUICK[name], kind)
    hash(QUICK[name])
    card = attacks.describe(name)
    assert card.name == name
    assert set(card.goals) <= set(GOALS)
    assert all(json.loads(json.dumps(card.to_dict())).values())


def test_there_is_no_attack_of_an_unknown_name() -> None:
    with pytest.raises(InputError, match=r"no attack 'magic'; choose one of .*badnets"):
        attacks.get("magic")
