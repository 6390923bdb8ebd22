"""MetaPoison around its gradient: the staggered ensemble, placement, resuming, goals and budgets."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unpoison import attacks
from unpoison.attacks._surrogates import Epoch, Surrogates, Upbringing, ensemble
from unpoison.attacks._unrolled import look_ahead
from unpoison.attacks.metapoison import CraftStep, MetaPoison
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
TINY = MetaPoison(surrogates=2, lifetime=3, steps=3, unroll=1, concentrate=3, recipe=RECIPE)


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


# The ensemble.


def upbringing(**changes: Any) -> Upbringing:
    values: dict[str, Any] = {
        "training_set": CLEAN,
        "templates": (),
        "recipe": RECIPE,
        "lifetime": 4,
        "pretrained": False,
        "seed": 0,
    }
    return Upbringing(**{**values, **changes})


@pytest.mark.parametrize("pretraining", ["separate", "shared"])
@pytest.mark.parametrize("together", [1, 2, 3])
def test_ages_are_staggered_and_start_again(pretraining: Any, together: int) -> None:
    stacks = ensemble(upbringing(), 3, together=together, pretraining=pretraining)
    assert [age for stack in stacks for age in stack.ages] == [0, 1, 2]  # floor(m T / M) with T = 4
    lives = []
    for _ in range(5):
        for stack in stacks:
            stack.grow(Epoch(stack))
            stack.come_of_age()
        lives.append([life for stack in stacks for life in stack.lives])
    assert [age for stack in stacks for age in stack.ages] == [
        1,
        2,
        3,
    ]  # one more than five epochs ago, mod T
    assert lives == [[0, 0, 0], [0, 0, 1], [0, 1, 1], [1, 1, 1], [1, 1, 1]]


def test_a_new_life_has_new_parameters_and_a_pretrained_one_the_given() -> None:
    given = build("convnet-bn", num_classes=3, image_size=8, width=2, seed=5)
    for pretrained in (False, True):
        raising = upbringing(templates=(given,), lifetime=1, pretrained=pretrained)
        (stack,) = ensemble(raising, 1, together=1, pretraining="separate")
        first = stack.taken(0)
        stack.grow(Epoch(stack))
        assert not torch.equal(
            stack.taken(0)["parameter.classifier.weight"], first["parameter.classifier.weight"]
        )
        stack.come_of_age()
        again = stack.taken(0)["parameter.classifier.weight"]
        weight = given.state_dict()["classifier.weight"]
        assert torch.equal(again, weight) == pretrained
        assert torch.equal(first["parameter.classifier.weight"], weight) == pretrained
        assert stack.taken(0)["momentum.classifier.weight"].count_nonzero() == 0


def test_surrogates_learn() -> None:
    images = torch.zeros(60, 1, 8, 8, dtype=torch.uint8)
    labels = torch.arange(60) % 2
    images[labels == 1, :, :4] = 255
    easy = TrainingSet(images, labels, ("dark", "half"), "easy")
    (stack,) = ensemble(upbringing(training_set=easy), 1, together=1, pretraining="shared")
    for _ in range(4):
        stack.grow(Epoch(stack))
    logits = stack.stack(stack.parameters, stack.buffers, easy.images[None].float() / 255, train=False)
    assert (logits[0].argmax(1) == labels).float().mean() > 0.95


def test_networks_of_two_architectures_cannot_be_stacked() -> None:
    templates = tuple(
        build("convnet-bn", num_classes=3, image_size=8, width=width, seed=0) for width in (2, 3)
    )
    assert len(ensemble(upbringing(templates=templates), 2, together=1, pretraining="separate")) == 2
    with pytest.raises(InputError, match="must have one architecture"):
        ensemble(upbringing(templates=templates), 2, together=2, pretraining="separate")
    frozen = build("convnet-bn", num_classes=3, image_size=8, width=2, seed=0).requires_grad_(False)
    with pytest.raises(InputError, match="nothing to train"):
        ensemble(upbringing(templates=(frozen,)), 1, together=1, pretraining="separate")


# One craft step.


@pytest.mark.parametrize("concentrate", [0, 1, 3, 5, 100])
@pytest.mark.parametrize("together", [1, 2])
def test_every_poison_has_one_gradient_a_network_and_step(
    concentrate: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: Counter[int] = Counter()
    batches: Counter[int] = Counter()

    def spy(*arguments: Any, **named: Any) -> Any:
        (images, labels), *later = arguments[4]
        assert len(later) == 1
        batches[images.shape[0]] += 1
        # Poisons are told from clean images by what the LInf start left of them.
        known = {image.numpy().tobytes(): place for place, image in enumerate(CLEAN.images.float() / 255)}
        fresh = [image for image in images.detach().flatten(0, 1) if image.numpy().tobytes() not in known]
        seen.update(_original(image) for image in fresh)
        assert labels.shape == images.shape[:2]
        assert all(image.numpy().tobytes() in known for image in later[0][0].flatten(0, 1))
        return look_ahead(*arguments, **named)

    monkeypatch.setattr("unpoison.attacks.metapoison.look_ahead", spy)
    made = craft(options(steps=1, concentrate=concentrate, together=together))
    assert seen == dict.fromkeys(made.indices.tolist(), 2)
    if concentrate == 3:
        assert batches == {together: 3 * 2 // together}  # 7 poisons in batches of 3


def _original(image: Tensor) -> int:
    return int((CLEAN.images.float() / 255 - image).abs().flatten(1).amax(1).argmin())


@pytest.mark.parametrize("trajectory", ["clean", "poisoned"])
def test_the_trajectory_sees_poisons_only_if_it_is_to(
    trajectory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    real = Surrogates.train

    def spy(self: Any, epoch: Any, batch: int, poisons: Any = None) -> None:
        told.append(0 if poisons is None else len(poisons[0]))
        real(self, epoch, batch, poisons)

    monkeypatch.setattr(Surrogates, "train", spy)
    craft(options(surrogates=1, steps=2, trajectory=trajectory))
    assert len(told) == 2 * 4
    assert sum(told) == (2 * 7 if trajectory == "poisoned" else 0)


def test_crafting_lowers_the_loss_of_a_fixed_surrogate() -> None:
    # A lifetime of one epoch, pretrained: every step meets the same network, so losses can be compared.
    given = build("convnet-bn", num_classes=3, image_size=8, width=2, seed=5)
    attack = options(
        surrogates=1, lifetime=1, steps=12, start="pretrained", rate=0.25, perturbation=LInf(32), drop_every=4
    )
    history: list[CraftStep] = []
    made = craft(attack, budget=14, surrogate=given, on_step=history.append)
    losses = [step.loss for step in history]
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.1
    assert made.configuration["history"] == [step.to_dict() for step in history]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"concentrate": 0, "together": 2},
        {"optimizer": "adam", "rate": 200.0, "warmup": 2},
        {"objective": "cross-entropy", "depths": "last", "unroll": 2},
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


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "adam", "rate": 200.0, "concentrate": 0},
        {"together": 2, "perturbation": ColorGrid(resolution=3) + LInf(4)},
    ],
    ids=["signed", "adam", "stacked"],
)
def test_a_killed_craft_goes_on_to_the_same_poisons(changes: dict[str, Any], tmp_path: Path) -> None:
    attack = options(steps=4, **changes)

    def kill(step: CraftStep) -> None:
        if step.step == 1:
            raise Killed

    with pytest.raises(Killed):
        craft(attack, checkpoints=tmp_path, on_step=kill)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0002"]
    told: list[CraftStep] = []
    resumed = craft(attack, checkpoints=tmp_path, on_step=told.append)
    assert [step.step for step in told] == [2, 3]
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
    goals = (GOAL, SelfConcealment(CLEAN.images[1:3], 1), TargetedMisclassification(CLEAN.images[:2], 0, 2))
    steps: list[tuple[CraftStep, ...]] = []
    together = TINY.craft_together(
        goals, CLEAN, budget=Budget(count=7), seed=3, checkpoints=tmp_path, on_step=steps.append
    )
    assert [len(step) for step in steps] == [3, 3, 3]
    for goal, made in zip(goals, together, strict=True):
        assert same(made, craft(goal=goal))
    with pytest.raises(InputError, match="only on a clean trajectory"):
        options(trajectory="poisoned").craft_together(goals, CLEAN, budget=Budget(count=7), seed=3)
    with pytest.raises(InputError, match="at least one goal"):
        TINY.craft_together((), CLEAN, budget=Budget(count=7), seed=3)


def test_it_stops_when_the_loss_has_settled() -> None:
    # The margin is cut off at once, so the loss is flat from the start.
    history = craft(options(confidence=0.0, steps=9, patience=2, surrogates=1)).configuration["history"]
    assert 4 <= len(history) <= 9
    losses = [sum(step["losses"]) for step in history]
    assert len(history) == 9 or sum(losses[-2:]) >= sum(losses[-4:-2])
    goals = (GOAL, TargetedMisclassification(CLEAN.images[2:3], 2, 1))
    attack = options(objective="cross-entropy", patience=1, steps=8)
    for goal, made in zip(
        goals, attack.craft_together(goals, CLEAN, budget=Budget(count=7), seed=3), strict=True
    ):
        assert same(made, craft(attack, goal))


# What is poisoned.


def test_poisons_come_from_the_goal_s_class_or_from_a_third() -> None:
    assert set(craft().given_labels.tolist()) == {1}
    assert set(craft(goal=SelfConcealment(CLEAN.images[:1], 0)).given_labels.tolist()) == {0}
    third = options(poison_classes=(2,))
    assert set(craft(third).given_labels.tolist()) == {2}
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
        ({"depths": "some"}, "depths must be one of all, last, found 'some'"),
        ({"rate": 0}, "rate must be above 0"),
        ({"watermark": 1.0}, r"watermark must be in \[0, 1\)"),
        ({"lifetime": 5}, "lifetime 5 is more than the recipe's 4 epochs"),
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
    with pytest.raises(InputError, match=r"is to use class 7, but the classes are 0\.\.2"):
        craft(options(poison_classes=(7,)))
    with pytest.raises(InputError, match="needs a surrogate to start from"):
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
    assert attacks.get("metapoison", preset="fine-tuning").unroll == 4
    assert attacks.get("metapoison", preset="small", steps=5).steps == 5
    assert all(math.isfinite(preset.rate_at(0)) for preset in PRESETS)


def test_a_surrogate_with_dropout_leaves_global_randomness_alone(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 3))
    state = torch.random.get_rng_state()
    first = craft(options(steps=2), surrogate=network)
    assert torch.equal(torch.random.get_rng_state(), state)

    def kill(step: CraftStep) -> None:
        raise Killed

    with pytest.raises(Killed):
        craft(options(steps=2), surrogate=network, checkpoints=tmp_path, on_step=kill)
    assert same(first, craft(options(steps=2), surrogate=network, checkpoints=tmp_path))
