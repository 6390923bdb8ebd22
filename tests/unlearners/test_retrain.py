from __future__ import annotations

import pytest
import torch
from torch import nn

from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.training import Recipe, train
from unpoison.unlearners import Retrain

RECIPE = Recipe(model="resnet9", width=2, epochs=1, batch_size=16, learning_rate=0.05)


def make_set() -> TrainingSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return TrainingSet(images, torch.arange(40) % 2, ("a", "b"), "drawn")


def assert_same(left: nn.Module, right: nn.Module) -> None:
    others = right.state_dict()
    assert all(torch.equal(value, others[key]) for key, value in left.state_dict().items())


def test_it_is_training_as_if_the_examples_had_never_been_there() -> None:
    clean = make_set()
    victim = train(clean, RECIPE, seed=0)
    healed = Retrain().heal(victim, clean, [1, 2, 3], seed=9)
    expected = train(clean.without([1, 2, 3]), RECIPE, seed=9)
    assert_same(healed.model, expected.model)
    assert healed.recipe == RECIPE
    assert healed.seed == 9


def test_a_given_recipe_comes_first() -> None:
    clean = make_set()
    other = Recipe(model="convnet", width=2, epochs=1, batch_size=8, learning_rate=0.01)
    healed = Retrain().heal(train(clean, RECIPE, seed=0), clean, [1], recipe=other)
    assert healed.recipe == other
    assert type(healed.model) is type(train(clean, other, seed=0).model)


def own_network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))


@pytest.mark.parametrize("trained", [False, True])
def test_a_network_of_the_callers_own_is_trained_from_where_it_started(trained: bool) -> None:
    clean, start = make_set(), own_network()
    victim = train(clean, RECIPE, seed=0, start=start)
    model, recipe = (victim, None) if trained else (victim.model, RECIPE)
    before = {key: value.clone() for key, value in start.state_dict().items()}
    healed = Retrain().heal(model, clean, [1], recipe=recipe, start=start, seed=3)
    assert_same(healed.model, train(clean.without([1]), RECIPE, seed=3, start=start).model)
    assert type(healed.model) is nn.Sequential
    assert healed.model.state_dict().keys() == start.state_dict().keys()
    assert (healed.own_model, healed.recipe) == (True, RECIPE)
    assert all(torch.equal(value, before[key]) for key, value in start.state_dict().items())


@pytest.mark.parametrize("trained", [False, True])
def test_without_its_start_it_is_refused_with_what_to_do(trained: bool) -> None:
    clean = make_set()
    victim = train(clean, RECIPE, seed=0, start=own_network())
    with pytest.raises(InputError, match=r"retrain: this network is not built by a recipe; give start="):
        Retrain().heal(victim if trained else victim.model, clean, [1], recipe=RECIPE)


def test_a_pretrained_start_may_stand_in_for_the_recipes_network() -> None:
    clean = make_set()
    victim = train(clean, RECIPE, seed=0)
    pretrained = train(clean.without([1]), RECIPE, seed=7).model
    healed = Retrain().heal(victim, clean, [1], start=pretrained, seed=3)
    assert_same(healed.model, train(clean.without([1]), RECIPE, seed=3, start=pretrained).model)
    assert healed.own_model
