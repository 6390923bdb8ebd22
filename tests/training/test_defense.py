"""The hooks of a defense: none overridden changes nothing, each one reaches the training, all resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.training import Batch, Defense, Recipe, Step, Trained, train

RECIPE = Recipe(
    model="resnet9",
    width=2,
    epochs=3,
    batch_size=16,
    learning_rate=0.05,
    schedule="multistep",
    milestones=(2,),
    flip=True,
    crop_padding=1,
    label_smoothing=0.1,
)


def some_set() -> TrainingSet:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(50) % 2
    images = torch.randint(0, 128, (50, 1, 12, 12), generator=generator) + 100 * labels[:, None, None, None]
    return TrainingSet(images.to(torch.uint8), labels, ("dark", "bright"), "test set")


def same(first: nn.Module, second: nn.Module) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


class Idle(Defense):
    def __repr__(self) -> str:
        return "Idle()"


class Full(Defense):
    """Overrides every hook, draws in each, and has state."""

    def __repr__(self) -> str:
        return "Full()"

    def begin(self, training_set: TrainingSet, recipe: Recipe, *, seed: int) -> TrainingSet:
        self.last = recipe.milestones[-1]
        self.drops = torch.zeros((), dtype=torch.int64)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randint(0, 20, training_set.images.shape, generator=generator, dtype=torch.uint8)
        images = training_set.images + noise
        return TrainingSet(images, training_set.labels, training_set.class_names, training_set.name)

    def keep(self, epoch: int, model: nn.Module, training_set: TrainingSet, alive: Tensor) -> Tensor:
        if epoch < self.last:
            alive[int(self.drops)] = False
            self.drops = self.drops + 1
        return alive

    def batch(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images, draws = batch.images, batch.generator
        assert images.dtype == torch.uint8
        both = torch.cat([batch.augment(images), batch.augment(images.float() / 255)])
        share = torch.rand((), generator=draws)
        targets = nn.functional.one_hot(batch.labels, 2).float().repeat(2, 1)
        return both + 0.01 * torch.randn(both.shape, generator=draws), share * targets + (1 - share) / 2

    def gradients(self, step: Step) -> tuple[Tensor, Tensor]:
        assert step.model.training
        logits = step.logits_of(step.images)
        loss = step.loss_of(logits, step.targets, reduction="none").reshape(2, -1).amax(0).mean()
        loss.backward()
        for parameter in step.model.parameters():
            assert parameter.grad is not None
            parameter.grad += 0.001 * torch.randn(parameter.shape, generator=step.generator)
        return loss, logits

    def state(self) -> dict[str, Tensor]:
        return {"drops": self.drops}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.drops = state["drops"]

    def report(self) -> dict[str, Any]:
        return {"drops": int(self.drops)}


def test_a_defense_that_overrides_nothing_changes_nothing() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, 2))
    for start in (None, model):
        plain, idle = (train(some_set(), RECIPE, seed=0, start=start, defense=one) for one in (None, Idle()))
        assert same(plain.model, idle.model)
        assert [(one.loss, one.accuracy) for one in plain.history] == [
            (one.loss, one.accuracy) for one in idle.history
        ]
    assert plain.defense is None
    assert idle.defense == {"name": "Idle()"}
    assert not len(idle.dropped)


def test_every_hook_reaches_the_training_and_resumes_to_the_same_weights(tmp_path: Path) -> None:
    def interrupt(stage: str, done: int, total: int, /, **metrics: float) -> None:
        if done == 2:
            raise KeyboardInterrupt

    before = torch.random.get_rng_state()
    whole = train(some_set(), RECIPE, seed=0, defense=Full())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not same(whole.model, train(some_set(), RECIPE, seed=0).model)
    assert not same(whole.model, train(some_set(), RECIPE, seed=1, defense=Full()).model)
    assert [record.examples for record in whole.history] == [49, 48, 48]
    assert all(0 <= record.accuracy <= 1 for record in whole.history)
    assert whole.dropped.tolist() == [0, 1]
    assert whole.defense == {"name": "Full()", "drops": 2}
    assert whole.training_fingerprint == some_set().fingerprint
    with pytest.raises(KeyboardInterrupt):
        train(some_set(), RECIPE, seed=0, defense=Full(), checkpoints=tmp_path, progress=interrupt)
    resumed = train(some_set(), RECIPE, seed=0, defense=Full(), checkpoints=tmp_path)
    assert same(whole.model, resumed.model)
    assert resumed.dropped.tolist() == [0, 1]
    assert resumed.defense == whole.defense


class Contiguous(Idle):
    """Makes gradients contiguous, which the weights of convolutions are not in training."""

    def gradients(self, step: Step) -> tuple[Tensor, Tensor]:
        found = super().gradients(step)
        for parameter in step.model.parameters():
            assert parameter.grad is not None
            parameter.grad = parameter.grad.contiguous()
        return found


def test_the_layout_of_gradients_does_not_matter() -> None:
    assert same(
        train(some_set(), RECIPE, seed=0, defense=Contiguous()).model, train(some_set(), RECIPE, seed=0).model
    )


def test_one_object_defends_several_runs() -> None:
    defense = Full()
    first, again = (train(some_set(), RECIPE, seed=0, defense=defense) for _ in range(2))
    assert same(first.model, again.model)


def test_it_is_stored_with_the_model(tmp_path: Path) -> None:
    train(some_set(), RECIPE, seed=0, defense=Full()).save(tmp_path / "defended")
    train(some_set(), RECIPE, seed=0).save(tmp_path / "plain")
    assert [path.name for path in sorted((tmp_path / "plain").iterdir())] == [
        "model.safetensors",
        "trained.json",
    ]
    found = Trained.load(tmp_path / "defended")
    assert found.defense == {"name": "Full()", "drops": 2}
    assert found.dropped.tolist() == [0, 1]
    assert Trained.load(tmp_path / "plain").defense is None
    (tmp_path / "defended" / "dropped.safetensors").unlink()
    with pytest.raises(InputError, match=r"dropped\.safetensors: cannot be read"):
        Trained.load(tmp_path / "defended")


def test_what_is_not_included_stays_out() -> None:
    trained = train(some_set(), RECIPE, seed=0, defense=Full(), include=torch.arange(50) > 0)
    assert trained.dropped.tolist() == [1]


class Shrinking(Idle):
    def begin(self, training_set: TrainingSet, recipe: Recipe, *, seed: int) -> TrainingSet:
        return training_set.subset(range(10))


class Mangling(Idle):
    def __init__(self, images: Any, targets: Any) -> None:
        self.mangled = images, targets

    def batch(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.mangled[0](batch.images), self.mangled[1](batch.labels)


def test_a_defense_that_misbehaves_is_named() -> None:
    with pytest.raises(InputError, match=r"Idle\(\): begin must return the same examples"):
        train(some_set(), RECIPE, seed=0, defense=Shrinking())
    for images, targets in [
        (lambda images: images, lambda labels: labels),
        (lambda images: images.float()[..., 1:], lambda labels: labels),
        (lambda images: images.float(), lambda labels: labels[1:]),
        (lambda images: images.float(), lambda labels: labels.float()),
        (lambda images: images.float(), lambda labels: torch.zeros(len(labels), 1)),
    ]:
        with pytest.raises(InputError, match=r"Idle\(\): batch must return float images"):
            train(some_set(), replace(RECIPE, epochs=3), seed=0, defense=Mangling(images, targets))
