from __future__ import annotations

import torch
from torch import nn

from unpoison.data import TrainingSet
from unpoison.models import reinitialized
from unpoison.training import Recipe, Trained, train
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


def test_an_own_network_keeps_its_architecture_and_nothing_else() -> None:
    clean, network = make_set(), own_network()
    healed = Retrain().heal(network, clean, [1], recipe=RECIPE, seed=3)
    expected = train(clean.without([1]), RECIPE, seed=3, model=reinitialized(network, seed=3))
    assert_same(healed.model, expected.model)
    frozen = own_network().requires_grad_(False)
    assert_same(Retrain().heal(frozen, clean, [1], recipe=RECIPE, seed=3).model, expected.model)
    assert isinstance(healed, Trained)


def test_an_own_network_within_a_trained_one_is_not_mistaken_for_the_recipes() -> None:
    clean, network = make_set(), own_network()
    victim = train(clean, RECIPE, seed=0, model=network)
    healed = Retrain().heal(victim, clean, [1], seed=3)
    assert isinstance(healed.model, nn.Sequential)
    assert healed.own_model
    assert_same(healed.model, Retrain().heal(network, clean, [1], recipe=RECIPE, seed=3).model)


def test_without_any_recipe_the_preset_for_the_sample_is_taken() -> None:
    assert Retrain().heal(own_network(), make_set(), [1]).recipe == Recipe.preset("sample")
