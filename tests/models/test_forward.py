"""Networks of any precision and output: their logits, or one line that says what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.models import features, logits_of
from unpoison.training import Recipe, predict, train


class Network(nn.Module):
    """Linear on 12 pixels; `output` decides what it returns beside the logits."""

    def __init__(self, output: str = "tensor") -> None:
        super().__init__()
        self.linear = nn.Linear(12, 3)
        self.output = output

    def forward(self, images: Tensor) -> Any:
        logits = self.linear(images.flatten(1))
        if self.output == "tuple":
            return logits, images
        if self.output == "mapping":
            return {"logits": logits}
        if self.output == "object":
            return type("Output", (), {"logits": logits})()
        if self.output == "one tensor":
            return {"scores": logits, "loss": None}
        if self.output == "loss first":
            return logits.sum(), logits
        return {"features": logits, "images": images} if self.output == "no logits" else logits


def make(output: str = "tensor") -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Network(output).eval()


IMAGES = torch.randint(0, 256, (9, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELLED = TrainingSet(IMAGES, torch.arange(9) % 3, ("a", "b", "c"), "drawn")
RECIPE = Recipe(epochs=2, batch_size=4, learning_rate=0.1)


@pytest.mark.parametrize("output", ["tuple", "mapping", "object", "one tensor", "loss first"])
def test_the_logits_in_what_a_network_returns(output: str) -> None:
    assert torch.equal(predict(make(output), IMAGES), predict(make(), IMAGES))
    expected, found = (
        train(LABELLED, RECIPE, seed=0, start=make(kind)).model.state_dict() for kind in ("tensor", output)
    )
    assert all(torch.equal(expected[name], value) for name, value in found.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_network_is_given_images_in_its_own_precision(dtype: torch.dtype) -> None:
    network = make().to(dtype)
    logits = predict(network, IMAGES)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, predict(make(), IMAGES), atol=3e-2, rtol=0)
    assert features(network, "linear", IMAGES).dtype == dtype
    trained = train(LABELLED, RECIPE, seed=0, start=network)
    assert all(parameter.dtype == dtype for parameter in trained.model.parameters())


def test_a_network_without_logits_or_for_other_images_is_refused() -> None:
    with pytest.raises(InputError, match="returns a dict with nothing that is known to be logits"):
        predict(make("no logits"), IMAGES)
    with pytest.raises(InputError, match=r"fails on torch.float32 inputs of shape \(3, 4, 4\)") as error:
        predict(make(), torch.zeros(2, 3, 4, 4))
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="fails on"):
        train(LABELLED, RECIPE, seed=0, start=nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten()))


def test_gradients_flow_through() -> None:
    images = IMAGES.float().div(255).requires_grad_()
    logits_of(make("tuple"), images).sum().backward()
    assert images.grad is not None
    assert bool((images.grad != 0).any())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_may_be_called_where_gradients_are_off(mode: Any) -> None:
    expected = train(LABELLED, RECIPE, seed=0, start=make()).model.state_dict()
    with mode():
        found = train(LABELLED, RECIPE, seed=0, start=make()).model.state_dict()
        torch.testing.assert_close(predict(make(), IMAGES), predict(make(), IMAGES, batch_size=2))
    assert all(torch.equal(expected[name], value) for name, value in found.items())
