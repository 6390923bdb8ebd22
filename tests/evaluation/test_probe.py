"""What a probe notes is what a plain calculation gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_recipe import images
from torch import Tensor

from unpoison.evaluation._probe import gradient_norms, positions
from unpoison.models import build


def at(*rows: tuple[float, float, float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_effective_examples_are_nearer_to_the_target_than_to_their_class() -> None:
    near, far, pull = (0.0, 0.0, 0.0), (-0.8, 0.0, 0.8), (-1.0, 0.0, 1.0)
    gradients = at(near, near, far, near, far, near)
    labels = torch.tensor([0, 0, 0, 0, 0, 1])
    truth = torch.tensor([False, False, False, True, True, False])
    notes = positions(gradients, labels, truth, at(pull)[0])
    assert notes["effective"] == {"poisons": 0.5, "clean": pytest.approx(1 / 3)}
    centre = gradients[:3].mean(0)
    expected = sorted(float((gradients[place] - centre).norm()) for place in (3, 4))
    assert notes["to_class"]["poisons"][1] == pytest.approx(sum(expected) / 2)
    assert notes["to_nearest"]["clean"] == [0.0, 0.0, 0.0]
    assert notes["target_to_class"] == pytest.approx(float((at(pull)[0] - centre).norm()))


def test_norms_are_those_of_the_mean_gradients() -> None:
    clean = images(12, 0)
    model = build("convnet", num_classes=3, in_channels=1, image_size=(12, 12), width=4, seed=0).eval()
    kept = torch.arange(12) % 4 != 0
    notes = gradient_norms(model, clean, kept)

    def mean_gradient(mask: Tensor) -> Tensor:
        loss = F.cross_entropy(model(clean.images[mask].float() / 255), clean.labels[mask])
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])

    everything = mean_gradient(torch.ones(12, dtype=torch.bool))
    assert notes["gradient"] == pytest.approx(float(everything.norm()), rel=1e-4)
    difference = float((everything - mean_gradient(kept)).norm())
    assert notes["difference"] == pytest.approx(difference, rel=1e-4)
