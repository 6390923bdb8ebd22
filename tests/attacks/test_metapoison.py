"""MetaPoison around its gradient: the staggered ensemble, placement, resuming, goals and budgets."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from unpoison import attacks
from unpoison.attacks import MetaPoison
from unpoison.attacks.metapoison.surrogates import (
    SurrogateConfiguration,
    SurrogateStack,
    stacks_of,
    stagger,
)
from unpoison.data import TrainingSet
from unpoison.errors import InputError, MismatchError, TrainingDivergedError
from unpoison.models import build
from unpoison.threats import (
    Backdoor,
    Budget,
    ColorGrid,
    Goal,
    LInf,
    PatchTrigger,
    PoisonSet,
    SelfConcealment,
    TargetedMisclassification,
    make_goal,
)
from unpoison.training import Recipe

RECIPE = Recipe(
    model="convnet-bn",
    width=2,
    epochs=4,
    batch_size=12,
    learning_rate=0.05,
    momentum=0.5,
    nesterov=False,
    weight_decay=1e-3,
)
PRESETS = [MetaPoison(**settings) for settings in MetaPoison.PRESETS.values()]
TINY = MetaPoison(surrogates=2, lifetime=3, steps=3, unroll=1, poisons_per_batch=3, recipe=RECIPE)


def make_set(n: int = 48, channels: int = 3) -> TrainingSet:
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, channels, 8, 8), dtype=torch.uint8, generator=draws)
    return TrainingSet(images, torch.arange(n) % 3, ("a", "b", "c"), "drawn")


CLEAN = make_set()
GOAL = TargetedMisclassification(CLEAN.images[:1], 0, 1)


def craft(
    attack: MetaPoison = TINY, goal: Goal = GOAL, budget: int = 7, seed: int = 3, **more: Any
) -> PoisonSet:
    return attack.craft(goal, CLEAN, budget=Budget(count=budget), seed=seed, **more)


def options(**changes: Any) -> MetaPoison:
    return dataclasses.replace(TINY, **changes)


def same(first: PoisonSet, second: PoisonSet) -> bool:
    return torch.equal(first.images, second.images) and first.configuration == second.configuration


def losses_of(poison: PoisonSet) -> list[float]:
    return [sum(step["losses"]) / len(step["losses"]) for step in poison.configuration["history"]]


class Steps:
    """Keeps what `progress` is told of craft steps, and raises after one of them."""

    def __init__(self, kill_after: int | None = None) -> None:
        self.kill_after = kill_after
        self.told: list[tuple[int, int, dict[str, float]]] = []
        self.pretraining: list[tuple[int, int]] = []

    def __call__(self, stage: str, done: int, total: int, /, **metrics: float) -> None:
        if stage == "pretraining":
            self.pretraining.append((done, total))
            return
        assert stage == "craft"
        self.told.append((done, total, metrics))
        if done == self.kill_after:
            raise Killed


class Killed(Exception):
    pass


# The ensemble.


def configuration(**changes: Any) -> SurrogateConfiguration:
    values: dict[str, Any] = {
        "training_set": CLEAN,
        "templates": (),
        "recipe": RECIPE,
        "lifetime": 4,
        "pretrained": False,
        "seed": 0,
    }
    return SurrogateConfiguration(**{**values, **changes})


def staggered(
    configuration: SurrogateConfiguration, count: int, *, vmap_size: int = 1, pretraining: Any = "separate"
) -> list[SurrogateStack]:
    stacks = stacks_of(configuration, count, vmap_size=vmap_size)
    stagger(stacks, pretraining=pretraining, report=lambda done, total: None)
    return stacks


@pytest.mark.parametrize("pretraining", ["separate", "shared"])
@pytest.mark.parametrize("vmap_size", [1, 2, 3])
def test_epochs_are_staggered_and_expired_networks_restart(pretraining: Any, vmap_size: int) -> None:
    stacks = staggered(configuration(), 3, vmap_size=vmap_size, pretraining=pretraining)
    assert [epoch for stack in stacks for epoch in stack.epochs] == [0, 1, 2]  # floor(m T / M) with T = 4
    restarts = []
    for _ in range(5):
        for stack in stacks:
            stack.train_epoch()
            stack.restart_expired()
        restarts.append([count for stack in stacks for count in stack.restarts])
    assert [epoch for stack in stacks for epoch in stack.epochs] == [1, 2, 3]  # 5 more, modulo T
    assert restarts == [[0, 0, 0], [0, 0, 1], [0, 1, 1], [1, 1, 1], [1, 1, 1]]


def test_a_restart_has_new_parameters_and_a_pretrained_one_the_given() -> None:
    given = build("convnet-bn", num_classes=3, image_size=8, width=2, seed=5)
    for pretrained in (False, True):
        [stack] = staggered(configuration(templates=(given,), lifetime=1, pretrained=pretrained), 1)
        first = stack.state_of(0)["parameter.classifier.weight"]
        stack.train_epoch()
        assert not torch.equal(stack.state_of(0)["parameter.classifier.weight"], first)
        stack.restart_expired()
        again = stack.state_of(0)["parameter.classifier.weight"]
        weight = given.state_dict()["classifier.weight"]
        assert torch.equal(again, weight) == pretrained
        assert torch.equal(first, weight) == pretrained
        assert stack.state_of(0)["momentum.classifier.weight"].count_nonzero() == 0


def test_surrogates_learn() -> None:
    images = torch.zeros(60, 1, 8, 8, dtype=torch.uint8)
    labels = torch.arange(60) % 2
    images[labels == 1, :, :4] = 255
    easy = TrainingSet(images, labels, ("dark", "half"), "easy")
    [stack] = staggered(configuration(training_set=easy), 1, pretraining="shared")
    for _ in range(4):
        stack.train_epoch()
    logits = stack.network(stack.parameters, stack.buffers, easy.images[None].float() / 255, train=False)
    assert (logits[0].argmax(1) == labels).float().mean() > 0.95


def test_networks_of_two_architectures_cannot_be_stacked() -> None:
    templates = tuple(
        build("convnet-bn", num_classes=3, image_size=8, width=width, seed=0) for width in (2, 3)
    )
    assert len(craft(options(steps=1), surrogate=templates)) == 7
    with pytest.raises(InputError, match="must have one architecture"):
        craft(options(vmap_size=2), surrogate=templates)
    frozen = build("convnet-bn", num_classes=3, image_size=8, width=2, seed=0).requires_grad_(False)
    with pytest.raises(InputError, match="nothing to train"):
        craft(surrogate=frozen)


# One craft step.


class Recorder(nn.Module):
    """A linear network that keeps the images it is given; copies of it keep them together."""

    batches: ClassVar[list[Tensor]] = []

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(192, 3)

    def forward(self, images: Tensor) -> Tensor:
        self.batches.append(images.detach().clone())
        logits: Tensor = self.linear(images.flatten(1))
        return logits


def poisons_seen(attack: MetaPoison) -> tuple[PoisonSet, list[Counter[int]]]:
    """For each batch with poisons that a network was given while crafting, how often each poison is in it."""
    Recorder.batches.clear()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Recorder()
    made = craft(attack, surrogate=network)
    clean = CLEAN.images.float() / 255
    known = {image.numpy().tobytes() for image in clean}
    found = []
    for batch in Recorder.batches:
        fresh = [image for image in batch if image.numpy().tobytes() not in known]
        if fresh:
            found.append(Counter(int((clean - one).abs().flatten(1).amax(1).argmin()) for one in fresh))
    return made, found


@pytest.mark.parametrize("poisons_per_batch", [0, 1, 3, 5, 100])
def test_every_poison_has_one_gradient_for_each_network_and_step(poisons_per_batch: int) -> None:
    made, batches = poisons_seen(options(steps=1, poisons_per_batch=poisons_per_batch))
    assert sum(batches, Counter()) == dict.fromkeys(made.indices.tolist(), 2)
    if poisons_per_batch == 3:
        assert [sum(batch.values()) for batch in batches] == [3, 3, 1] * 2


@pytest.mark.parametrize(("trajectory", "times"), [("clean", 1), ("poisoned", 2)])
def test_the_trajectory_contains_poisons_only_if_it_is_to(trajectory: Any, times: int) -> None:
    made, batches = poisons_seen(options(surrogates=1, steps=1, trajectory=trajectory))
    assert sum(batches, Counter()) == dict.fromkeys(made.indices.tolist(), times)


@pytest.mark.parametrize("poisons_per_batch", [0, 3])
def test_networks_under_vmap_give_what_they_give_one_by_one(poisons_per_batch: int) -> None:
    alone, stacked = (
        craft(options(steps=2, poisons_per_batch=poisons_per_batch, vmap_size=size)) for size in (1, 2)
    )
    assert losses_of(stacked) == pytest.approx(losses_of(alone), rel=1e-3)
    assert (alone.images == stacked.images).float().mean() > 0.95


def test_crafting_lowers_the_loss_of_a_fixed_surrogate() -> None:
    # A pretrained network that restarts every epoch is the same in every step, so losses can be compared.
    given = build("convnet-bn", num_classes=3, image_size=8, width=2, seed=5)
    attack = options(
        surrogates=1, lifetime=1, steps=12, start="pretrained", rate=0.25, perturbation=LInf(32), drop_every=4
    )
    steps = Steps()
    made = craft(attack, budget=14, surrogate=given, progress=steps)
    losses = losses_of(made)
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.1
    assert [(done, total) for done, total, _ in steps.told] == [(step + 1, 12) for step in range(12)]
    assert [metrics["loss"] for _, _, metrics in steps.told] == pytest.approx(losses)
    assert [metrics["achieved"] for _, _, metrics in steps.told] == [
        step["achieved"] for step in made.configuration["history"]
    ]


@pytest.mark.parametrize(("pretraining", "epochs"), [("separate", 3), ("shared", 2)])
def test_progress_is_told_of_pretraining(pretraining: Any, epochs: int) -> None:
    steps = Steps()
    craft(options(surrogates=3, steps=1, pretraining=pretraining), progress=steps)
    assert steps.pretraining == [(done + 1, epochs) for done in range(epochs)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"poisons_per_batch": 0, "vmap_size": 2},
        {"optimizer": "adam", "rate": 200.0, "warmup": 2},
        {"objective": "cross-entropy", "loss_steps": "last", "unroll": 2},
        {"objective": "carlini-wagner-zeroed", "target_in_batch": False, "trajectory": "poisoned"},
        {"perturbation": ColorGrid(eps=0.05, resolution=3) + LInf(4), "pretraining": "separate"},
        {"recipe": dataclasses.replace(RECIPE, flip=True, crop_padding=1, batch_size=47)},
    ],
    ids=lambda changes: ", ".join(f"{name}" for name in changes) or "tiny",
)
def test_poisons_keep_to_the_perturbation_and_to_the_seed(changes: dict[str, Any]) -> None:
    attack = options(**changes)
    made, again = craft(attack), craft(attack)
    assert same(made, again)
    assert 0 < float(made.linf.max()) <= attack.perturbation.bound() + 0.5
    assert torch.equal(made.given_labels, CLEAN.labels[made.indices])
    assert set(made.given_labels.tolist()) == {1}


# Resuming, and several goals at once.


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "adam", "rate": 200.0, "poisons_per_batch": 0},
        {"vmap_size": 2, "perturbation": ColorGrid(resolution=3) + LInf(4)},
    ],
    ids=["signed", "adam", "stacked"],
)
def test_a_killed_craft_goes_on_to_the_same_poisons(changes: dict[str, Any], tmp_path: Path) -> None:
    attack = options(steps=4, **changes)
    with pytest.raises(Killed):
        craft(attack, checkpoints=tmp_path, progress=Steps(kill_after=2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-0002"]
    rest = Steps()
    resumed = craft(attack, checkpoints=tmp_path, progress=rest)
    assert [done for done, _, _ in rest.told] == [3, 4]
    assert same(resumed, craft(attack))
    assert same(resumed, craft(attack, checkpoints=tmp_path))


def test_a_checkpoint_of_another_craft_is_refused(tmp_path: Path) -> None:
    craft(checkpoints=tmp_path)
    with pytest.raises(MismatchError, match="belongs to a craft with another goal, another seed"):
        craft(goal=TargetedMisclassification(CLEAN.images[3:4], 0, 1), seed=4, checkpoints=tmp_path)
    with pytest.raises(MismatchError, match="another configuration"):
        craft(options(rate=0.3), checkpoints=tmp_path)
    (tmp_path / "step-0003" / "state.safetensors").write_bytes(b"?")
    with pytest.raises(InputError, match="damaged checkpoint"):
        craft(checkpoints=tmp_path)


def test_goals_crafted_together_are_each_as_alone(tmp_path: Path) -> None:
    goals = (GOAL, SelfConcealment(CLEAN.images[1:2], 1), TargetedMisclassification(CLEAN.images[:2], 0, 2))
    steps = Steps()
    together = TINY.craft_together(
        goals, CLEAN, budget=Budget(count=7), seed=3, checkpoints=tmp_path, progress=steps
    )
    for goal, made in zip(goals, together, strict=True):
        assert same(made, craft(goal=goal))
    mean = [sum(losses) / 3 for losses in zip(*map(losses_of, together), strict=True)]
    assert [metrics["loss"] for _, _, metrics in steps.told] == pytest.approx(mean)
    with pytest.raises(InputError, match="only on a clean trajectory"):
        options(trajectory="poisoned").craft_together(goals, CLEAN, budget=Budget(count=7), seed=3)
    with pytest.raises(InputError, match="at least one goal"):
        TINY.craft_together((), CLEAN, budget=Budget(count=7), seed=3)


def test_it_stops_when_the_loss_no_longer_falls() -> None:
    # A margin that is cut off at 0 is 0 for every step of a surrogate that does already what is wanted.
    achieved = SelfConcealment(CLEAN.images[:1], 2)
    attack = options(confidence=0.0, steps=9, patience=2, surrogates=1)
    given = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    with torch.no_grad():
        given[1].weight.zero_()  # type: ignore[operator, union-attr]
        given[1].bias.copy_(torch.tensor([50.0, 0.0, 0.0]))  # type: ignore[operator, union-attr]
    made = craft(dataclasses.replace(attack, start="pretrained"), achieved, surrogate=given)
    assert losses_of(made) == [0.0] * 4
    goals = (GOAL, TargetedMisclassification(CLEAN.images[2:3], 2, 1))
    attack = options(objective="cross-entropy", patience=1, steps=8)
    for goal, made in zip(
        goals, attack.craft_together(goals, CLEAN, budget=Budget(count=7), seed=3), strict=True
    ):
        assert same(made, craft(attack, goal))


# Every goal of the paper, from the plain values that a command line or a recipe holds.

GIVEN = build("convnet-bn", num_classes=3, image_size=8, width=2, seed=5)


@pytest.mark.parametrize(
    ("goal", "text", "classes"),
    [
        ({"target": "b", "test_indices": [0]}, "", {1}),
        ({"target": "b", "test_indices": [0, 3, 6]}, "", {1}),
        ({"test_indices": [0, 3]}, "", {0}),
        ({"target": 1, "test_indices": [0]}, 'poison_classes = ["c"]', {2}),
        ({"target": 1, "test_indices": [0]}, 'poison_classes = ["c", 0]\nselection = "first"', {0, 2}),
        ({"target": 1, "test_indices": [0]}, 'start = "pretrained"\nwatermark = 0.3', {1}),
        ({"test_indices": [0]}, 'start = "pretrained"', {0}),
        ({"target": 1, "test_indices": [0]}, 'perturbation = [{ kind = "color-grid", eps = 0.05 }, 8]', {1}),
    ],
    ids=[
        "targeted",
        "several targets",
        "self-concealment",
        "third class",
        "several classes",
        "fine-tuning",
        "concealed in fine-tuning",
        "colours",
    ],
)
def test_every_goal_is_reachable_from_plain_values(
    goal: dict[str, Any], text: str, classes: set[int]
) -> None:
    recipe = 'recipe = { model = "convnet-bn", width = 2, epochs = 2, batch_size = 12, momentum = 0.5 }'
    plain = tomllib.loads(f"surrogates = 2\nlifetime = 2\nsteps = 2\nunroll = 1\n{recipe}\n{text}")
    attack = attacks.get("metapoison", **plain)
    made = attack.craft(
        make_goal(
            attacks.describe("metapoison").goals, class_names=CLEAN.class_names, test_set=CLEAN, **goal
        ),
        CLEAN,
        budget=Budget(count=7),
        surrogate=GIVEN if plain.get("start") == "pretrained" else None,
        seed=0,
    )
    assert set(made.given_labels.tolist()) == classes
    assert torch.equal(made.given_labels, made.clean_labels)
    assert len(made.goal.victims(CLEAN)[0]) == len(goal["test_indices"])
    assert made.goal.kind == ("targeted-misclassification" if "target" in goal else "self-concealment")


def test_poisons_are_the_first_of_their_classes_in_turn() -> None:
    assert set(craft(goal=SelfConcealment(CLEAN.images[:1], 0)).given_labels.tolist()) == {0}
    several = options(poison_classes=(0, 1, 2), selection="first")
    assert craft(several).indices.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert craft(options(selection="first")).indices.tolist() == [1, 4, 7, 10, 13, 16, 19]


def test_a_watermark_lies_under_the_perturbation() -> None:
    attack = options(watermark=0.3, steps=1, perturbation=LInf(2))
    made = craft(attack)
    expected = 0.7 * CLEAN.images[made.indices].float() + 0.3 * GOAL.images.float()
    assert (made.images.float() - expected).abs().max() <= 2.51


def test_grey_images_and_a_batch_larger_than_the_set() -> None:
    grey = make_set(12, channels=1)
    goal = TargetedMisclassification(grey.images[:1], 0, 1)
    attack = options(recipe=dataclasses.replace(RECIPE, batch_size=500), steps=1)
    assert len(attack.craft(goal, grey, budget=Budget(count=4), seed=0)) == 4
    with pytest.raises(InputError, match="use LInf alone"):
        attacks.get("metapoison", preset="published").craft(goal, grey, budget=Budget(count=4), seed=0)


# What is refused.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surrogates": 0}, "surrogates must be a whole number of at least 1, found 0"),
        ({"unroll": 1.5}, "unroll must be a whole number"),
        ({"loss_steps": "some"}, "loss_steps must be one of 'all', 'last', found 'some'"),
        ({"rate": 0}, "rate must be a number above 0"),
        ({"watermark": 1.0}, r"watermark must be a number in \[0, 1\)"),
        ({"lifetime": 5}, "lifetime 5 is more than the recipe's 4 epochs"),
        ({"perturbation": {"kind": "magic"}}, "unknown kind 'magic'"),
        ({"perturbation": "wide"}, "expected a number, a mapping with a kind, or a list, found 'wide'"),
        ({"recipe": {"preset": "magic"}}, "there is no preset 'magic'"),
        ({"recipe": {"epoch": 1}}, "unknown field 'epoch'"),
    ],
)
def test_options_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        options(**changes)


def test_options_may_be_plain_values_and_come_back_from_the_configuration() -> None:
    plain = options(recipe=RECIPE.to_dict(), perturbation=4, poison_classes=[2])
    assert plain == options(recipe=RECIPE, perturbation=LInf(4), poison_classes=(2,))
    assert MetaPoison(recipe="sample", lifetime=15).recipe == Recipe.preset("sample")  # type: ignore[arg-type]
    for preset in PRESETS:
        assert MetaPoison(**preset.configuration()) == preset


def test_what_cannot_be_crafted_is_refused() -> None:
    with pytest.raises(InputError, match="not 'backdoor'"):
        craft(goal=Backdoor(PatchTrigger.white_corner(), 0, 1))
    with pytest.raises(
        InputError, match=r"17 of 48\) is more than the 16 examples of class 1 \(b\); at most 16"
    ):
        craft(budget=17)
    with pytest.raises(InputError, match=r"poison_classes 7: no such class; .*number 0\.\.2"):
        craft(options(poison_classes=(7,)))
    with pytest.raises(InputError, match="needs a surrogate, the network that victims start from"):
        craft(options(start="pretrained"))
    with pytest.raises(InputError, match="there is no preset 'best'; there are small, sample"):
        attacks.get("metapoison", preset="best")


def test_a_diverging_surrogate_is_named() -> None:
    wild = dataclasses.replace(RECIPE, learning_rate=1e6, model="convnet", batch_size=24)
    with pytest.raises(TrainingDivergedError, match="surrogate 0 is not finite at step"):
        craft(options(recipe=wild, surrogates=1, steps=4, lifetime=4))


def test_the_published_preset_is_the_paper_s() -> None:
    published = attacks.get("metapoison", preset="published")
    assert isinstance(published, MetaPoison)
    assert (published.surrogates, published.lifetime, published.steps, published.unroll) == (24, 24, 61, 2)
    assert published.perturbation == ColorGrid(0.04, 10, 1.0) + LInf(8)
    rates = [published.rate_at(step) for step in (0, 1, 4, 19, 20, 39, 40, 60)]
    assert rates == pytest.approx([8, 32, 200, 200, 20, 20, 2, 0.2])
    assert attacks.get("metapoison", preset="fine-tuning").configuration()["unroll"] == 4
    assert attacks.get("metapoison", preset="small", steps=5).configuration()["steps"] == 5
    assert all(math.isfinite(preset.rate_at(0)) for preset in PRESETS)


def test_a_surrogate_with_dropout_leaves_global_randomness_alone(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 3))
    state = torch.random.get_rng_state()
    first = craft(options(steps=2), surrogate=network)
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(Killed):
        craft(options(steps=2), surrogate=network, checkpoints=tmp_path, progress=Steps(kill_after=1))
    assert same(first, craft(options(steps=2), surrogate=network, checkpoints=tmp_path))
