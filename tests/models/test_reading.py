"""Features of any module by path, and models given back as they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unpoison.errors import InputError
from unpoison.models import FeatureTap, build, features, preserved


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_features_are_those_of_a_hand_written_forward_pass() -> None:
    model = build("convnet-bn", num_classes=3, width=4, seed=0)
    model(torch.rand(8, 3, 32, 32))
    images = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)
    penultimate = features(model, "classifier", images, batch_size=2, side="input")
    logits = features(model, "classifier", images.float() / 255, batch_size=5)
    model.eval()
    expected = model(images.float() / 255)
    assert torch.allclose(logits, expected, atol=1e-6)
    assert torch.allclose(model.classifier(penultimate), expected, atol=1e-6)
    assert features(model, "convolutions.0", images).shape == (5, 4 * 32 * 32)
    assert not logits.requires_grad


def test_gradients_flow_through_a_tap() -> None:
    model = build("resnet9", num_classes=3, width=2, seed=0).eval()
    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    with FeatureTap(model, "residual1.second") as tap:
        model(images)
    tap.value.sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert hooks(model) == 0


def test_the_tap_is_removed_after_an_error() -> None:
    model = build("resnet9", num_classes=3, width=2, seed=0)
    with pytest.raises(RuntimeError), FeatureTap(model, "stage1"):
        model(torch.rand(2, 5, 16, 16))
    assert hooks(model) == 0
    with pytest.raises(InputError, match=r"model: fails on torch.float32 inputs of shape \(5, 16, 16\)"):
        features(model, "stage1", torch.rand(2, 5, 16, 16))
    assert hooks(model) == 0
    assert model.training


def test_a_wrong_path_gets_the_nearest_one() -> None:
    model = build("resnet9", num_classes=3, width=2, seed=0)
    with pytest.raises(InputError, match="did you mean 'classifier'"):
        FeatureTap(model, "clasifier")


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.LSTM(4, 2, batch_first=True)
        self.unused = nn.Linear(4, 2)
        self.total = nn.Identity()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        rows = self.used(images.flatten(2))[0]
        self.total(rows.sum())
        return rows


def test_modules_that_return_tuples_nothing_or_no_rows() -> None:
    images = torch.rand(3, 2, 2, 2)
    assert features(Odd(), "used", images).shape == (3, 4)
    with pytest.raises(InputError, match="does not reach this module"):
        features(Odd(), "unused", images)
    with pytest.raises(InputError, match="one row an image"):
        features(Odd(), "total", images)


def test_preserved_restores_everything_also_after_an_error() -> None:
    model = build("resnet9", num_classes=3, width=2, seed=0)
    model.stage1.eval()
    model.classifier.bias.requires_grad_(False)
    model(torch.rand(2, 3, 16, 16)).sum().backward()
    handle = model.stage1.register_forward_hook(lambda *_: None)
    modes = [module.training for module in model.modules()]
    gradients = [parameter.grad for parameter in model.parameters()]
    values = [None if gradient is None else gradient.clone() for gradient in gradients]

    def misuse() -> None:
        with preserved(model) as same:
            assert not any(module.training for module in same.modules())
            assert all(parameter.grad is None for parameter in same.parameters())
            same.requires_grad_(True)
            same(torch.rand(2, 3, 16, 16)).sum().backward()
            same.train()
            same.stage2.register_forward_hook(lambda *_: None)
            same.stage2.register_full_backward_hook(lambda *_: None)
            handle.remove()
            raise KeyError

    with pytest.raises(KeyError):
        misuse()
    assert [module.training for module in model.modules()] == modes
    assert not model.classifier.bias.requires_grad
    for parameter, gradient, value in zip(model.parameters(), gradients, values, strict=True):
        assert parameter.grad is gradient
        assert value is None or torch.equal(gradient, value)
    assert hooks(model) == 1
    assert not model.stage2._backward_hooks
    handle.remove()
    assert hooks(model) == 0
