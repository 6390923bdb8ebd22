from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.threats import (
    Backdoor,
    Goal,
    LabelNoise,
    PatchTrigger,
    SelfConcealment,
    TargetedMisclassification,
)


class SeesWhiteCorner(nn.Module):
    """Predicts class 2 when the bottom right pixel is white, else class 0; records how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(3))
        self.noise = nn.Dropout(0.9)
        self.largest_batch = 0

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        assert images.dtype == torch.float32
        assert images.max() <= 1
        self.largest_batch = max(self.largest_batch, len(images))
        white = (images[:, 0, -1, -1] == 1).float()
        return torch.stack([1 - white, torch.zeros_like(white), white], 1) + self.bias


@pytest.fixture
def test_set() -> TrainingSet:
    images = torch.full((10, 3, 8, 8), 100, dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
    return TrainingSet(images, labels, ("a", "b", "c"), "ten images")


def test_backdoor_success_is_measured_on_stamped_images_of_the_source(test_set: TrainingSet) -> None:
    goal = Backdoor(PatchTrigger.white_corner(), source=0, target=2)
    images, indices = goal.victims(test_set)
    assert indices.tolist() == [0, 3, 6, 9]
    assert (images[:, :, -3:, -3:] == 255).all()
    model = SeesWhiteCorner().train()
    success = goal.success(model, test_set, batch_size=3)
    assert (success.successes, success.trials) == (4, 4)
    assert model.largest_batch == 3
    assert model.training
    assert model.noise.training


def test_a_backdoor_without_a_source_takes_all_classes_but_the_target(test_set: TrainingSet) -> None:
    goal = Backdoor(PatchTrigger.four_pixels(), source=None, target=2)
    assert goal.victims(test_set)[1].tolist() == [0, 1, 3, 4, 6, 7, 9]
    assert goal.success(SeesWhiteCorner(), test_set).successes == 0


def test_modes_come_back_when_the_model_fails(test_set: TrainingSet) -> None:
    class Fails(SeesWhiteCorner):
        def forward(self, images: Tensor) -> Tensor:
            raise RuntimeError("broken")

    model = Fails().train()
    model.noise.eval()
    with pytest.raises(InputError, match=r"fails on .*broken"):
        Backdoor(PatchTrigger.white_corner(), source=0, target=2).success(model, test_set)
    assert model.training
    assert not model.noise.training


def test_a_backdoor_names_what_it_cannot_do(test_set: TrainingSet) -> None:
    trigger = PatchTrigger.white_corner()
    with pytest.raises(InputError, match="same class 1"):
        Backdoor(trigger, source=1, target=1)
    with pytest.raises(InputError, match=">= 0"):
        Backdoor(trigger, source=-1, target=1)
    with pytest.raises(InputError, match=r"names class 3, but the classes are 0\.\.2"):
        Backdoor(trigger, source=3, target=1).victims(test_set)
    with pytest.raises(InputError, match="no image of class 1"):
        Backdoor(trigger, source=1, target=0).victims(test_set.subset([0, 2]))


def test_targeted_misclassification_holds_its_images(test_set: TrainingSet) -> None:
    goal = TargetedMisclassification.of(test_set, (0, 3), target=2)
    assert goal.true_label == 0
    images, indices = goal.victims(test_set)
    assert torch.equal(images, test_set.images[[0, 3]])
    assert indices.tolist() == [0, 3]
    assert goal.success(SeesWhiteCorner(), test_set).successes == 0
    stranger = TargetedMisclassification(PatchTrigger.white_corner().stamp(test_set.images[:1]), 0, 2)
    assert stranger.success(SeesWhiteCorner(), test_set).successes == 1
    assert stranger.victims(test_set)[1].tolist() == [-1]


def test_targeted_misclassification_names_what_it_cannot_do(test_set: TrainingSet) -> None:
    with pytest.raises(InputError, match="one true label"):
        TargetedMisclassification.of(test_set, (0, 1), target=2)
    with pytest.raises(InputError, match="two different class numbers"):
        TargetedMisclassification.of(test_set, 0, target=0)
    with pytest.raises(InputError, match="uint8"):
        TargetedMisclassification(torch.zeros(1, 3, 8, 8), 0, 1)
    with pytest.raises(InputError, match="1 test indices, 2 images"):
        TargetedMisclassification(test_set.images[:2], 0, 1, (4,))
    with pytest.raises(InputError, match=r"have shape \(3, 4, 4\)"):
        TargetedMisclassification(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), 0, 1).victims(test_set)


@pytest.mark.parametrize(
    "goal",
    [
        Backdoor(PatchTrigger.white_corner(), source=0, target=1),
        TargetedMisclassification(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), 0, 1),
    ],
    ids=lambda goal: goal.kind,
)
def test_the_loss_is_small_where_the_target_wins_and_has_a_gradient(goal: Goal) -> None:
    wins = torch.tensor([[0.0, 9.0, 0.0], [0.0, 8.0, 0.0]], requires_grad=True)
    loses = torch.tensor([[9.0, 0.0, 0.0], [0.0, 0.0, 8.0]])
    assert goal.loss(wins) < 0.01 < 8 < goal.loss(loses)
    goal.loss(wins).backward()
    assert wins.grad is not None
    assert bool(goal.achieved(wins.argmax(1)).all())
    assert not bool(goal.achieved(loses.argmax(1)).any())


@pytest.mark.parametrize(
    ("goal", "own"),
    [
        (Backdoor(PatchTrigger.white_corner(), source=0, target=1), True),
        (TargetedMisclassification(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), 0, 1), True),
        (LabelNoise(0, 1), True),
        (SelfConcealment(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), 1), False),
        (LabelNoise(1), False),
    ],
    ids=["backdoor", "targeted", "label noise", "self-concealment", "label noise to any class"],
)
def test_losses_keep_their_gradient_where_the_adversary_has_succeeded(goal: Goal, own: bool) -> None:
    """At a probability of 1 - 1e-12 of what is wanted, in float32 against float64."""
    row = torch.tensor([0.3, 28.0, -0.2] if own else [0.3, -28.0, -0.2])
    slopes = []
    for dtype in (torch.float64, torch.float32):
        logits = row.to(dtype).repeat(2, 1).requires_grad_()
        slopes.append(torch.autograd.grad(goal.loss(logits), logits)[0].double())
    exact, found = slopes
    assert bool((exact != 0).all())
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=0)


def test_goals_come_back_from_json(test_set: TrainingSet) -> None:
    backdoor = Backdoor(PatchTrigger.four_pixels(value=255), source=None, target=2)
    again = Goal.from_json(backdoor.to_json(), backdoor.tensors())
    assert isinstance(again, Backdoor)
    assert again.to_json() == backdoor.to_json()
    assert torch.equal(again.trigger.stamp(test_set.images), backdoor.trigger.stamp(test_set.images))
    targeted = TargetedMisclassification.of(test_set, 0, target=1)
    returned = Goal.from_json(targeted.to_json(), targeted.tensors())
    assert isinstance(returned, TargetedMisclassification)
    assert returned.to_json() == targeted.to_json()
    assert torch.equal(returned.images, targeted.images)
    with pytest.raises(InputError, match="unknown kind 'fame'"):
        Goal.from_json({"kind": "fame"}, {})
