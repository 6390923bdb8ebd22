"""Frozen extractors: the same logits, the same descent, and nothing but the last layer changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_recipe import images
from torch import nn

from unpoison.errors import InputError
from unpoison.evaluation._transfer import FrozenExtractor, finished, starting_network
from unpoison.training import Recipe, Trained, batch_bounds, train
from unpoison.training._batches import epoch_order

RECIPE = Recipe(
    model="convnet-bn",
    width=4,
    epochs=4,
    batch_size=32,
    learning_rate=0.1,
    nesterov=False,
    schedule="multistep",
    milestones=(3,),
)


@pytest.fixture(scope="module")
def pretrained() -> Trained:
    return train(images(80, 0, ("a", "b", "c", "d")), RECIPE, seed=0)


def test_a_frozen_network_is_the_network(pretrained: Any) -> None:
    few = images(60, 1)
    network = starting_network(pretrained, few, RECIPE, seed=1, freeze=True)
    assert isinstance(network, FrozenExtractor)
    whole, batch = network.whole(), few.images.float() / 255
    with torch.no_grad():
        torch.testing.assert_close(network(batch), whole(batch))
        torch.testing.assert_close(network.train()(batch), whole(batch))  # also in training mode
    assert network(batch).shape == (60, 3)
    assert {name for name, one in network.named_parameters() if one.requires_grad} == {
        "layer.weight",
        "layer.bias",
    }
    other = starting_network(pretrained, few, RECIPE, seed=2, freeze=True)
    assert not torch.equal(other.layer.weight, network.layer.weight)


def test_the_layer_is_that_of_plain_descent_on_features(pretrained: Any) -> None:
    few = images(60, 1)
    start = starting_network(pretrained, few, RECIPE, seed=1, freeze=True)
    trained = finished(train(few, RECIPE, seed=3, start=start))
    assert not trained.own_model
    layer: nn.Linear = copy.deepcopy(start.layer)
    with torch.no_grad():
        features = start.body(few.images.float() / 255)
    descent = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    everything = torch.ones(60, dtype=torch.bool)
    for epoch in range(RECIPE.epochs):
        order = epoch_order(everything, seed=3, epoch=epoch)
        bounds = batch_bounds(60, RECIPE.batch_size)
        for step, (first, end) in enumerate(bounds):
            descent.param_groups[0]["lr"] = RECIPE.learning_rate_at(epoch + (step + 0.5) / len(bounds))
            descent.zero_grad()
            chosen = order[first:end]
            F.cross_entropy(layer(features[chosen]), few.labels[chosen]).backward()
            descent.step()
    found = [module for module in trained.model.modules() if isinstance(module, nn.Linear)][-1]
    torch.testing.assert_close(found.weight, layer.weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.bias, layer.bias, atol=1e-5, rtol=1e-4)
    for name, value in start.whole().state_dict().items():
        if "classifier" not in name:
            assert torch.equal(trained.model.state_dict()[name], value)


def test_other_classes_bring_a_new_layer_and_the_same_classes_none(pretrained: Any) -> None:
    assert starting_network(pretrained, images(8, 1, ("a", "b", "c", "d")), RECIPE, seed=0, freeze=False) is (
        pretrained.model
    )
    network = starting_network(pretrained, images(60, 1), RECIPE, seed=0, freeze=False)
    assert network(torch.rand(2, 1, 12, 12)).shape == (2, 3)
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_another_architecture_is_refused(pretrained: Any) -> None:
    other = Recipe(model="resnet9", width=4)
    with pytest.raises(InputError, match="convnet-bn and resnet9 are different networks"):
        starting_network(pretrained, images(60, 1), other, seed=0, freeze=True)
