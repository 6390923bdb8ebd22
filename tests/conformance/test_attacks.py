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
from unpoison.threats import (
    Backdoor,
    Budget,
    Goal,
    Mistakes,
    PatchTrigger,
    PoisonSet,
    SelfConcealment,
    TargetedMisclassification,
)
from unpoison.training import Recipe

# What an attack needs to be quick; everything else is its default.
QUICK: dict[str, Attack] = {
    "badnets": attacks.BadNets(),
    "blended": attacks.Blended(),
    "bullseye-polytope": attacks.BullseyePolytope(steps=4, draws=2),
    "convex-polytope": attacks.ConvexPolytope(steps=4, inner=3),
    "feature-collision": attacks.FeatureCollision(steps=4),
    "gradient-matching": attacks.GradientMatching(steps=2, restarts=1, shift=1),
    "hidden-trigger": attacks.HiddenTrigger(steps=4, match_every=2),
    "label-consistent": attacks.LabelConsistent(within_eps=True, steps=3),
    "label-flip": attacks.LabelFlip(),
    "metapoison": attacks.MetaPoison(
        surrogates=1,
        lifetime=1,
        steps=2,
        unroll=1,
        recipe=Recipe(epochs=1, batch_size=64, learning_rate=0.01, momentum=0, nesterov=False),
    ),
    "sig": attacks.Sig(frequency=1),
    "sleeper-agent": attacks.SleeperAgent(
        steps=2, retrainings=1, recipe=Recipe(epochs=1, batch_size=64, learning_rate=0.01), shift=1
    ),
    "smooth-trigger": attacks.SmoothTrigger(rounds=2, steps=2, images=20),
    "wanet": attacks.WaNet(),
}

# How far an attack may move a value, in 1/255, and the same attack under another bound.
BOUNDED: dict[str, tuple[float, Callable[[float], Attack]]] = {
    "bullseye-polytope": (25.5, lambda eps: attacks.BullseyePolytope(eps=eps, steps=4)),
    "convex-polytope": (25.5, lambda eps: attacks.ConvexPolytope(eps=eps, steps=4)),
    "feature-collision": (8, lambda eps: attacks.FeatureCollision(eps=eps, steps=4, step_size=1e3)),
    "gradient-matching": (16, lambda eps: attacks.GradientMatching(eps=eps, steps=2, restarts=1, shift=1)),
    "hidden-trigger": (16, lambda eps: attacks.HiddenTrigger(eps=eps, steps=4, learning_rate=1e3)),
    "label-consistent": (8, lambda eps: attacks.LabelConsistent(eps=eps, within_eps=True, steps=3, step=99)),
    "sleeper-agent": (16, lambda eps: attacks.SleeperAgent(eps=eps, steps=2, retrainings=0, shift=1)),
}

# Attacks that also change examples without touching their labels, and their number of a count of changes.
COVERS: dict[str, Callable[[int], int]] = {"wanet": lambda count: count - max(1, round(count / 3))}

# Attacks that list every base they were given, although some of them may not be moved at all.
RESTING = {"convex-polytope"}

GOALS: dict[str, Callable[[TrainingSet], Goal]] = {
    "backdoor": lambda clean: Backdoor(PatchTrigger.white_corner(2), source=1, target=0),
    "mistakes": lambda clean: Mistakes(source=1),
    "self-concealment": lambda clean: SelfConcealment(clean.images[:1], 1),
    "targeted-misclassification": lambda clean: TargetedMisclassification(clean.images[1:2], 1, 0),
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
    member = made.membership(len(clean))
    assert torch.equal(differs & member, differs)
    assert name in RESTING or torch.equal(differs, member)


@pytest.mark.parametrize(("name", "kind", "which"), CASES)
def test_labels_are_as_promised(name: str, kind: str, which: str) -> None:
    clean = SETS[which]
    made = craft(name, kind, clean)
    assert torch.equal(made.clean_labels, clean.labels[made.indices])
    kept = int((made.given_labels == made.clean_labels).sum())
    if attacks.describe(name).labels == "clean":
        assert kept == len(made)
    else:
        assert kept == COVERS.get(name, lambda count: 0)(len(made))


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("which", SETS)
def test_eps_is_kept_after_rounding(name: str, which: str) -> None:
    clean = SETS[which]
    published, bounded = BOUNDED[name]
    network = surrogate(clean)
    for kind in attacks.describe(name).goals:
        assert float(craft(name, kind, clean).linf.max()) <= published
        # Half a step must not become a whole one, whatever the optimiser does.
        made = bounded(2.5).craft(
            GOALS[kind](clean), clean, budget=Budget(count=2), surrogate=network, seed=1
        )
        assert 0 < float(made.linf.max()) <= 2


@pytest.mark.parametrize("name", [name for name in attacks.names() if attacks.describe(name).surrogates])
def test_an_attack_that_needs_a_surrogate_says_so(name: str) -> None:
    clean = SETS["colour"]
    for kind in attacks.describe(name).goals:
        for nothing in (None, ()):
            with pytest.raises(InputError, match="surrogate") as error:
                QUICK[name].craft(
                    GOALS[kind](clean), clean, budget=Budget(count=1), surrogate=nothing, seed=0
                )
            assert "\n" not in str(error.value)
            assert name in str(error.value)


@pytest.mark.parametrize("name", attacks.names())
def test_a_class_that_is_not_there_is_named(name: str) -> None:
    clean = SETS["two classes"]
    goals: dict[str, Goal] = {
        "backdoor": Backdoor(PatchTrigger.white_corner(2), source=1, target=7),
        "mistakes": Mistakes(source=7),
        "targeted-misclassification": TargetedMisclassification(clean.images[:1], 1, 7),
    }
    for kind in set(attacks.describe(name).goals) & set(goals):
        with pytest.raises(InputError, match=r"class 7.*0\.\.1"):
            QUICK[name].craft(goals[kind], clean, budget=Budget(count=1), surrogate=surrogate(clean), seed=0)


@pytest.mark.parametrize("name", attacks.names())
def test_several_surrogates_are_taken(name: str) -> None:
    clean = SETS["grey"]
    for kind in attacks.describe(name).goals:
        made = QUICK[name].craft(
            GOALS[kind](clean),
            clean,
            budget=Budget(count=2),
            surrogate=[surrogate(clean), surrogate(clean)],
            seed=0,
        )
        assert len(made) == 2
        # The smooth trigger is made on the first of them alone.
        if attacks.describe(name).surrogates and name != "smooth-trigger":
            assert made.configuration["surrogates"] == 2


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
    kind = attacks.METHODS.implementation(name)
    assert issubclass(kind, Attack)
    assert not inspect.isabstract(kind)
    assert getattr(kind, "__final__", False)
    assert dataclasses.is_dataclass(kind)
    assert isinstance(QUICK[name], kind)
    hash(QUICK[name])
    card = attacks.describe(name)
    assert card.name == name
    assert set(card.goals) <= set(GOALS)
    told = json.loads(json.dumps(card.to_dict()))
    assert all(told.values())
    assert {"name", "title", "summary", "paper", "cost", "labels", "goals", "knowledge"} <= set(told)


def test_the_page_of_attacks_names_them_all() -> None:
    page = (Path(__file__).parents[2] / "docs/attacks.md").read_text(encoding="utf-8")
    assert [name for name in attacks.names() if f"| `{name}` |" not in page] == []


def test_there_is_no_attack_of_an_unknown_name() -> None:
    with pytest.raises(InputError, match=r"no attack 'magic'; there are badnets, blended"):
        attacks.get("magic")
