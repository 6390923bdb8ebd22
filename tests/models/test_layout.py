"""The memory layout that a network is given, also one that fails on channels last."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unpoison.data import TrainingSet
from unpoison.models import fastest_layout, features
from unpoison.training import Recipe, predict, train


class Viewing(nn.Module):
    """Flattens its maps with `view`, which needs contiguous maps."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 4, 3)
        self.second = nn.Conv2d(4, 4, 3)
        self.last = nn.Linear(4 * 16, 3)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.second(self.first(images).relu()).relu()
        logits: Tensor = self.last(maps.view(-1, 4 * 16))
        return logits


def some_set(channels: int) -> TrainingSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (24, channels, 8, 8), dtype=torch.uint8, generator=generator)
    return TrainingSet(images, torch.arange(24) % 3, ("a", "b", "c"), "drawn")


@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_that_views_its_maps_is_trained_and_evaluated(channels: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Viewing(channels)
    clean = some_set(channels)
    trained = train(clean, Recipe(epochs=2, batch_size=8), seed=0, start=network)
    for model in (network, trained.model):
        with torch.no_grad():
            expected = model(clean.images.float() / 255)
        torch.testing.assert_close(predict(model, clean.images, batch_size=1), expected)
        assert torch.equal(predict(model, clean.images).argmax(1), expected.argmax(1))
        assert features(model, "last", clean.images, side="input").shape == (24, 64)
        assert fastest_layout(model, clean.images) == torch.contiguous_format


def test_the_network_is_as_it_was() -> None:
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 2))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert fastest_layout(network, some_set(2).images) == torch.channels_last
    assert network.training
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    "images", [torch.zeros(0, 3, 8, 8, dtype=torch.uint8), torch.rand(5, 3), torch.rand(2, 3, 1, 1)]
)
def test_images_that_decide_nothing(images: Tensor) -> None:
    assert fastest_layout(Viewing(3), images) == torch.contiguous_format


@pytest.mark.parametrize(("channels", "stride", "size"), [(4, 2, 1), (7, (1, 2), 1)])
def test_layouts_that_may_write_past_a_gradient_are_avoided(channels: int, stride: Any, size: int) -> None:
    def network(channels: int, stride: Any, size: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(2, channels, 3), nn.Conv2d(channels, 8, size, stride=stride))

    images = some_set(2).images
    assert fastest_layout(network(channels, stride, size), images) == torch.contiguous_format
    for safe in ((8, stride, size), (channels, 1, size), (channels, stride, 3)):
        assert fastest_layout(network(*safe), images) == torch.channels_last
