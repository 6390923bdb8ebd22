"""What every registered attack promises, with no further work for a new one: no attack is exempt."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from unpoison import attacks
from unpoison.attacks import Attack, CraftRequest
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.threats import (
    AllToAll,
    Availability,
    Backdoor,
    Budget,
    Goal,
    LabelNoise,
    PatchTrigger,
    PoisonSet,
    SelfConcealment,
    TargetedMisclassification,
)

# Options that make an attack quick; attacks that are not listed here are tested with their defaults.
QUICK: dict[str, dict[str, Any]] = {
    "bullseye-polytope": {"steps": 4, "draws": 2},
    "combat": {"epochs": 1, "width": 2, "batch_size": 256},
    "convex-polytope": {"steps": 4, "inner": 3},
    "error-minimizing": {"rounds": 2, "steps": 1, "training_steps": 1, "batch_size": 256},
    "feature-collision": {"steps": 4},
    "gradient-matching": {"steps": 2, "restarts": 1, "shift": 1},
    "hidden-trigger": {"steps": 4, "match_every": 2},
    "input-aware": {"mask_epochs": 1, "epochs": 1, "width": 2, "batch_size": 256},
    "label-consistent": {"within_eps": True, "steps": 3},
    "metapoison": {
        "surrogates": 1,
        "lifetime": 1,
        "steps": 2,
        "unroll": 1,
        "recipe": {
            "epochs": 1,
            "batch_size": 64,
            "learning_rate": 0.01,
            "momentum": 0,
            "nesterov": False,
        },
    },
    "narcissus": {"steps": 3},
    "sig": {"frequency": 1},
    "sleeper-agent": {
        "steps": 2,
        "retrainings": 1,
        "recipe": {"epochs": 1, "batch_size": 64, "learning_rate": 0.01},
        "shift": 1,
    },
    "smooth-trigger": {"rounds": 2, "steps": 2, "images": 20},
    "tap": {"steps": 2, "shift": 1, "step_size": 2.0},
}

# With these options too, an attack with the option `eps` must stay within it, although it takes large steps.
LARGE_STEPS: dict[str, dict[str, Any]] = {
    "combat": {"generator_rate": 1.0},
    "error-minimizing": {"step_size": 99},
    "feature-collision": {"step_size": 1e3},
    "hidden-trigger": {"learning_rate": 1e3},
    "label-consistent": {"step": 99},
    "narcissus": {"step_size": 99},
    "sleeper-agent": {"retrainings": 0},
    "tap": {"step_size": 99},
}

# Attacks that also change examples without changing their labels, and how many of a count of changes.
COVERS: dict[str, Callable[[int], int]] = {
    "adaptive-blend": lambda count: count - max(1, round(count / 2)),
    "adaptive-patch": lambda count: count - max(1, round(count / 3)),
    "input-aware": lambda count: count - max(1, round(count / 2)),
    "tact": lambda count: count - max(1, round(count / 2)),
    "wanet": lambda count: count - max(1, round(count / 3)),
}

# Attacks that list every base they were given, although some may not change at all.
UNCHANGED = {"convex-polytope"}

GOALS: dict[str, Callable[[TrainingSet], Goal]] = {
    "all-to-all": lambda clean: AllToAll(PatchTrigger.white_corner(2), clean.num_classes),
    "availability": lambda clean: Availability(),
    "backdoor": lambda clean: Backdoor(PatchTrigger.white_corner(2), source=1, target=0),
    "label-noise": lambda clean: LabelNoise(source=1),
    "self-concealment": lambda clean: SelfConcealment(clean.images[:1], 1),
    "targeted-misclassification": lambda clean: TargetedMisclassification(clean.images[1:2], 1, 0),
}


def quick(name: str, **options: Any) -> Attack:
    return attacks.get(name, **{**QUICK.get(name, {}), **options})


def bounded(name: str) -> bool:
    """Whether the attack has a bound for every pixel."""
    return "eps" in [one.name for one in dataclasses.fields(attacks.METHODS.implementation(name))]  # type: ignore[arg-type]


def goals_of(name: str) -> list[str]:
    """The kinds of goal that are tested; a plug-in may serve others beside."""
    return [kind for kind in attacks.describe(name).goals if kind in GOALS]


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
    for kind in goals_of(name)
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
    return quick(name).craft(
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
    assert name in UNCHANGED or torch.equal(differs, member)


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


@pytest.mark.parametrize("name", [name for name in attacks.names() if bounded(name)])
@pytest.mark.parametrize("which", SETS)
def test_eps_is_kept_after_rounding(name: str, which: str) -> None:
    clean = SETS[which]
    attack: Any = quick(name)
    # Half a step must not become a whole one, whatever the optimiser does.
    half: Any = quick(name, **LARGE_STEPS.get(name, {}), eps=2.5)
    for kind in goals_of(name):
        assert float(craft(name, kind, clean).linf.max()) <= attack.eps
        made = half.craft(
            GOALS[kind](clean), clean, budget=Budget(count=2), surrogate=surrogate(clean), seed=1
        )
        assert 0 < float(made.linf.max()) <= 2


@pytest.mark.parametrize("name", [name for name in attacks.names() if attacks.describe(name).surrogates])
def test_an_attack_that_needs_a_surrogate_says_so(name: str) -> None:
    clean = SETS["colour"]
    for kind in goals_of(name):
        for nothing in (None, ()):
            with pytest.raises(InputError, match="surrogate") as error:
                quick(name).craft(
                    GOALS[kind](clean), clean, budget=Budget(count=1), surrogate=nothing, seed=0
                )
            assert "\n" not in str(error.value)
            assert name in str(error.value)


@pytest.mark.parametrize("name", attacks.names())
def test_a_class_that_is_not_there_is_named(name: str) -> None:
    clean = SETS["two classes"]
    goals: dict[str, Goal] = {
        "all-to-all": AllToAll(PatchTrigger.white_corner(2), 8),
        "backdoor": Backdoor(PatchTrigger.white_corner(2), source=1, target=7),
        "label-noise": LabelNoise(source=7),
        "self-concealment": SelfConcealment(clean.images[:1], 7),
        "targeted-misclassification": TargetedMisclassification(clean.images[:1], 1, 7),
    }
    for kind in set(goals_of(name)) - {"availability"}:  # which names none
        with pytest.raises(InputError, match=r"class [27].*0\.\.1"):
            quick(name).craft(goals[kind], clean, budget=Budget(count=1), surrogate=surrogate(clean), seed=0)


@pytest.mark.parametrize("name", attacks.names())
def test_several_surrogates_are_taken(name: str) -> None:
    clean = SETS["grey"]
    for kind in goals_of(name):
        made = quick(name).craft(
            GOALS[kind](clean),
            clean,
            budget=Budget(count=2),
            surrogate=[surrogate(clean), surrogate(clean)],
            seed=0,
        )
        assert len(made) == 2
        if attacks.describe(name).surrogates:
            assert made.configuration["surrogates"] == 2


class Mapping(nn.Module):
    """A network that returns its logits beside something else."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"images": images, "logits": self.network(images)}


@pytest.mark.parametrize(("name", "kind", "which"), [case for case in CASES if case.values[2] == "colour"])
def test_surrogates_are_taken_as_they_are(name: str, kind: str, which: str) -> None:
    clean, budget = SETS[which], Budget(count=3)
    goal, plain = GOALS[kind](clean), craft(name, kind, clean, budget=budget)
    mapping = Mapping(surrogate(clean))
    made = quick(name).craft(goal, clean, budget=budget, surrogate=mapping, seed=5)
    assert goal.success(mapping, clean) == goal.success(surrogate(clean), clean)
    assert torch.equal(made.images, plain.images)
    for dtype in (torch.float64, torch.bfloat16):
        network = surrogate(clean).to(dtype)
        made = quick(name).craft(goal, clean, budget=budget, surrogate=network, seed=5)
        assert len(made) == 3
        assert goal.success(network, clean).trials == goal.success(surrogate(clean), clean).trials


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
        quick(name).craft(GOALS[kind](clean), clean, budget=Budget(count=1), surrogate=network, seed=0)
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
                quick(name).craft(goal(clean), clean, budget=Budget(count=1), seed=0)
            assert kind in str(error.value)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", attacks.names())
def test_a_budget_that_does_not_fit_is_refused_with_what_would(name: str) -> None:
    clean = SETS["colour"]
    for kind in goals_of(name):
        with pytest.raises(InputError) as error:
            craft(name, kind, clean, budget=Budget(count=61))
        assert "61" in str(error.value)
        assert "60" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "kind", "which"), [case for case in CASES if case.values[2] == "grey"])
def test_progress_is_told_in_order_and_may_end_the_work(name: str, kind: str, which: str) -> None:
    clean = SETS[which]
    told: list[tuple[str, int, int]] = []

    def progress(stage: str, done: int, total: int, /, **metrics: float) -> None:
        assert all(math.isfinite(value) for value in metrics.values())
        told.append((stage, done, total))

    def end(stage: str, done: int, total: int, /, **metrics: float) -> None:
        raise KeyboardInterrupt

    goal, network = GOALS[kind](clean), surrogate(clean)
    made = quick(name).craft(
        goal, clean, budget=Budget(count=3), surrogate=network, seed=5, progress=progress
    )
    assert torch.equal(made.images, craft(name, kind, clean, budget=Budget(count=3)).images)
    steps = [(done, total) for stage, done, total in told if stage == "craft"]
    assert all(1 <= done <= total for done, total in steps)
    assert steps == sorted(set(steps))
    if steps:
        with pytest.raises(KeyboardInterrupt):
            quick(name).craft(goal, clean, budget=Budget(count=3), surrogate=network, seed=5, progress=end)
        assert network.training  # as it was


@pytest.mark.parametrize(("name", "kind", "which"), [case for case in CASES if case.values[2] == "colour"])
def test_surrogates_are_left_as_they_were_also_after_an_error(name: str, kind: str, which: str) -> None:
    clean, network = SETS[which], surrogate(SETS[which])
    network[1].eval()  # type: ignore[index]
    next(network.parameters()).requires_grad_(False)
    nn.functional.cross_entropy(network(clean.images[:9] / 255), clean.labels[:9]).backward()
    network.register_forward_hook(lambda *_: None)

    def end(stage: str, done: int, total: int, /, **metrics: float) -> None:
        raise KeyboardInterrupt

    def state() -> list[Any]:
        return [
            [part.training for part in network.modules()],
            [(one.requires_grad, id(one.grad)) for one in network.parameters()],
            [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in network.modules()],
            [value.tolist() for value in copy.deepcopy(network.state_dict()).values()],
            [None if one.grad is None else one.grad.tolist() for one in network.parameters()],
        ]

    before, goal, fingerprint = state(), GOALS[kind](clean), clean.fingerprint
    for progress in (None, end):
        with contextlib.suppress(KeyboardInterrupt):
            quick(name).craft(
                goal, clean, budget=Budget(count=3), surrogate=network, seed=5, progress=progress
            )
        assert state() == before
    assert clean.fingerprint == fingerprint == make_set(n=60, channels=3, classes=3, side=8).fingerprint


@pytest.mark.parametrize("name", attacks.names())
def test_it_is_a_final_frozen_dataclass_with_a_declaration(name: str) -> None:
    kind = attacks.METHODS.implementation(name)
    assert issubclass(kind, Attack)
    assert not inspect.isabstract(kind)
    assert getattr(kind, "__final__", False)
    assert dataclasses.is_dataclass(kind)
    method = attacks.describe(name)
    for preset in method.presets:
        attack = attacks.get(name, preset=preset)
        hash(attack)
        # Options are plain values in a recipe, and come back from the configuration of a poison set.
        assert attacks.get(name, preset=preset, **json.loads(json.dumps(attack.configuration()))) == attack
    assert method.name == name
    told = json.loads(json.dumps(method.to_dict()))
    assert all(told.values())
    assert {"name", "title", "summary", "paper", "cost", "labels", "goals", "knowledge"} <= set(told)


def test_there_is_no_attack_of_an_unknown_name() -> None:
    with pytest.raises(InputError, match="no attack 'magic'; there are adaptive-blend, adaptive-patch"):
        attacks.get("magic")


def test_an_attack_that_is_not_registered_says_so() -> None:
    class Unregistered(Attack):
        def poison(self, request: CraftRequest) -> PoisonSet:
            raise AssertionError

    clean = SETS["colour"]
    with pytest.raises(InputError, match="Unregistered: is not registered; declare it"):
        Unregistered().craft(GOALS["backdoor"](clean), clean, budget=Budget(count=1), seed=0)
