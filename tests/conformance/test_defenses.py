"""The contract of `Defense`, for every registered defense."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from unpoison import defenses
from unpoison.data import TrainingSet
from unpoison.defenses import DroppingDefense
from unpoison.errors import InputError
from unpoison.training import Defense, Recipe, Trained, train

# What a defense needs to do something in a training of four epochs. One that is not listed is tried with its
# defaults, so that a plug-in's is tested, too.
QUICK: dict[str, dict[str, Any]] = {
    "abl": {"isolated": 0.1},
    "dpa": {"partitions": 2},
    "finite-aggregation": {"partitions": 2, "spread": 2},
    "epic": {"subset_size": 0.3, "interval": 1, "warm_up": 1, "last_epoch": 2},
    "knn-outlier-filter": {
        "epochs": (1, 3),
        "min_train_accuracy": 0.0,
        "iqr_factor": 0.0,
        "min_distance": 0.0,
    },
    "loss-drop": {"sizes": ((1, 4), (2, 3))},
    "random-drop": {"share": 0.1, "interval": 1, "warm_up": 1},
}
RECIPE = Recipe(model="resnet9", width=2, epochs=4, batch_size=16, learning_rate=0.05, flip=True)
# DP-SGD needs a network without batch norm.
RECIPES = {"dp-sgd": Recipe(model="convnet", width=2, epochs=4, batch_size=16, learning_rate=0.05, flip=True)}
EACH = pytest.mark.parametrize("name", defenses.names())


def recipe_for(name: str) -> Recipe:
    return RECIPES.get(name, RECIPE)


def make(name: str) -> Defense:
    return defenses.get(name, **QUICK.get(name, {}))


def make_set(*counts: int) -> TrainingSet:
    generator = torch.Generator().manual_seed(0)
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    patterns = torch.rand(len(counts), 1, 8, 8, generator=generator)
    pixels = patterns[labels] + 0.3 * torch.randn(len(labels), 1, 8, 8, generator=generator)
    names = tuple(f"class {label}" for label in range(len(counts)))
    return TrainingSet((pixels.clamp(0, 1) * 255).byte(), labels, names, "drawn")


SETS = {"even": make_set(16, 16, 16), "a class of one": make_set(24, 1, 20)}


def weights(trained: Trained) -> Tensor:
    return torch.cat([value.double().flatten() for value in trained.model.state_dict().values()])


def test_every_declaration_is_whole() -> None:
    for name in defenses.names():
        method = defenses.describe(name)
        assert method.name == name
        for text in (method.title, method.summary, method.paper, method.cost):
            assert text
            assert "\n" not in text
        assert json.loads(json.dumps(method.to_dict()))["presets"] == list(method.presets)
    with pytest.raises(InputError, match="there is no defense 'prayer'"):
        defenses.describe("prayer")


@EACH
def test_every_preset_is_there(name: str) -> None:
    presets = defenses.describe(name).presets
    assert len(presets) == len(set(presets))
    made = {repr(defenses.get(name, preset=preset)) for preset in presets}
    assert len(made) >= len(presets) - 2  # two published schedules may be equal
    with pytest.raises(InputError, match="there is no preset 'nonsense'"):
        defenses.get(name, preset="nonsense")
    with pytest.raises(InputError, match="there is no option 'subset_sise'"):
        defenses.get(name, subset_sise=0.1)
    assert not {"seed", "device"} & {field.name for field in dataclasses.fields(make(name))}  # type: ignore[arg-type]


@EACH
def test_it_is_final_frozen_and_described_by_its_fields(name: str) -> None:
    defense, equal = make(name), make(name)
    kind = type(defense)
    assert getattr(kind, "__final__", False)
    assert not inspect.isabstract(kind)
    assert defense == equal
    assert hash(defense) == hash(equal)
    assert repr(defense) == repr(equal)
    assert dataclasses.replace(defense) == defense  # type: ignore[type-var]
    for field in dataclasses.fields(defense):  # type: ignore[arg-type]
        if field.init and field.repr:
            assert f"{field.name}=" in repr(defense)
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(defense, field.name, getattr(defense, field.name))


@EACH
@pytest.mark.parametrize("which", SETS)
def test_a_run_under_it(name: str, which: str) -> None:
    training_set = SETS[which]
    images = training_set.images.clone()
    state = torch.random.get_rng_state()
    defense = make(name)
    before = repr(defense)
    trained = train(training_set, recipe_for(name), seed=1, defense=defense)
    assert torch.equal(training_set.images, images)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert repr(defense) == before
    assert bool(torch.isfinite(weights(trained)).all())
    assert not trained.model.training
    assert trained.defense is not None
    assert json.loads(json.dumps(dict(trained.defense), allow_nan=False))["name"] == repr(defense)
    # Used again, and an equal one.
    again = train(training_set, recipe_for(name), seed=1, defense=defense)
    other = train(training_set, recipe_for(name), seed=1, defense=make(name))
    assert torch.equal(weights(trained), weights(again))
    assert torch.equal(weights(trained), weights(other))
    if isinstance(defense, DroppingDefense):
        assert defense.reports
        assert trained.dropped.tolist() == defense.reports[-1].dropped.nonzero().flatten().tolist()
        assert sum(report.newly for report in defense.reports) >= len(trained.dropped)


@EACH
def test_it_leaves_the_model_as_it_was(name: str) -> None:
    training_set = SETS["even"]
    model = train(training_set, recipe_for(name), seed=1).model
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    alive = torch.ones(len(training_set), dtype=torch.bool)
    defense = make(name)
    prepared = defense.begin(training_set, recipe_for(name), seed=0)
    for epoch in range(4):
        given = alive.clone()
        kept = defense.keep(epoch, model, prepared, given)
        assert torch.equal(given, alive)
        assert kept.dtype == torch.bool
        assert kept.shape == alive.shape
        assert bool((kept <= alive).all())
        alive = kept
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@EACH
def test_a_run_that_was_cut_off_ends_the_same(name: str, tmp_path: Any) -> None:
    class Cut(Exception):
        pass

    def cut(stage: str, done: int, total: int, /, **metrics: float) -> None:
        if done == 2:
            raise Cut

    training_set = SETS["even"]
    whole = train(training_set, recipe_for(name), seed=1, defense=make(name))
    with pytest.raises(Cut):
        train(training_set, recipe_for(name), seed=1, defense=make(name), checkpoints=tmp_path, progress=cut)
    resumed = train(training_set, recipe_for(name), seed=1, defense=make(name), checkpoints=tmp_path)
    assert torch.equal(weights(whole), weights(resumed))
    assert torch.equal(whole.dropped, resumed.dropped)


@EACH
def test_the_seed_of_the_run_decides(name: str) -> None:
    one, other = (train(SETS["even"], recipe_for(name), seed=seed, defense=make(name)) for seed in (1, 2))
    assert not torch.equal(weights(one), weights(other))


@EACH
def test_what_is_left_out_stays_out(name: str) -> None:
    training_set = SETS["even"]
    include = torch.arange(len(training_set)) % 3 > 0
    poisoned = TrainingSet(
        torch.where(include[:, None, None, None], training_set.images, 255 - training_set.images),
        training_set.labels,
        training_set.class_names,
        training_set.name,
    )
    one, other = (
        train(each, recipe_for(name), seed=1, defense=make(name), include=include)
        for each in (training_set, poisoned)
    )
    assert torch.equal(weights(one), weights(other))
    assert bool(include[one.dropped].all())
