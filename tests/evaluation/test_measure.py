from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.threats import Backdoor, PatchTrigger
from unpoison.training import Recipe, Trained
from unpoison.workflow import measure


class ByBrightness(nn.Module):
    """Class 0 for dark images, 1 for bright ones, 2 where the bottom right pixel is white."""

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        assert images.max() <= 1
        white = (images[:, 0, -1, -1] == 1).float()
        bright = (images[:, 0, 0, 0] > 0.5).float()
        return torch.stack([1 - bright, bright, 2 * white], 1)


@pytest.fixture
def test_set() -> TrainingSet:
    images = torch.zeros(7, 1, 8, 8, dtype=torch.uint8)
    images[3:5] = 200
    return TrainingSet(images, torch.tensor([0, 0, 0, 0, 1, 1, 1]), ("dark", "bright", "marked"), "seven")


def test_what_is_right_and_what_the_attack_reaches(test_set: TrainingSet) -> None:
    model = ByBrightness().train()
    result = measure(model, test_set, Backdoor(PatchTrigger.white_corner(), 1, 2), batch_size=2)
    assert (result.clean_accuracy.successes, result.clean_accuracy.trials) == (4, 7)
    assert [(part.successes, part.trials) for part in result.per_class] == [(3, 4), (1, 3), (0, 0)]
    assert result.attack_success is not None
    assert (result.attack_success.successes, result.attack_success.trials) == (3, 3)
    assert model.training


def test_without_a_goal_there_is_no_success(test_set: TrainingSet) -> None:
    assert measure(ByBrightness(), test_set).attack_success is None


def test_it_is_ready_for_json(test_set: TrainingSet) -> None:
    result = json.loads(json.dumps(measure(ByBrightness(), test_set).to_dict(), allow_nan=False))
    assert result["clean_accuracy"]["trials"] == 7
    assert result["per_class"][2]["rate"] is None
    assert result["attack_success"] is None


def test_a_trained_model_is_measured_like_its_network(test_set: TrainingSet) -> None:
    trained = Trained(
        model=ByBrightness(),
        recipe=Recipe(),
        seed=0,
        class_names=test_set.class_names,
        image_shape=(1, 8, 8),
        training_fingerprint="",
    )
    assert measure(trained, test_set) == measure(ByBrightness(), test_set)


def test_what_cannot_be_measured_is_refused(test_set: TrainingSet) -> None:
    with pytest.raises(InputError, match="seven: no test images"):
        measure(ByBrightness(), test_set.subset([]))
    with pytest.raises(InputError, match=r"outputs of shape \(2,\), but the set has 3 classes"):
        measure(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), test_set)
    with pytest.raises(InputError, match="no image of class 2"):
        measure(ByBrightness(), test_set, Backdoor(PatchTrigger.white_corner(), 2, 0))
