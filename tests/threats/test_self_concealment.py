from __future__ import annotations

import pytest
import torch

from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.threats import Backdoor, Goal, PatchTrigger, SelfConcealment, TargetedMisclassification

IMAGES = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)
CONCEALED = SelfConcealment(IMAGES, 1, (4, 7))
TARGETED = TargetedMisclassification(IMAGES, 1, 2)


def make_set() -> TrainingSet:
    images = torch.arange(4 * 3 * 4 * 4).reshape(4, 3, 4, 4).to(torch.uint8)
    return TrainingSet(images, torch.tensor([0, 1, 1, 2]), ("a", "b", "c"), "four images")


def test_any_other_class_is_success() -> None:
    assert CONCEALED.achieved(torch.tensor([0, 1, 2])).tolist() == [True, False, True]
    goal = SelfConcealment.of(make_set(), (1, 2))
    images, places = goal.victims(make_set())
    assert torch.equal(images, make_set().images[1:3])
    assert places.tolist() == [1, 2]


def test_its_loss_is_the_surprise_at_not_being_the_true_class() -> None:
    logits = torch.tensor([[1.0, 3.0, -2.0], [50.0, -50.0, 0.0]], requires_grad=True)
    expected = -(1 - logits.detach().double().softmax(1)[:, 1]).log().mean()
    assert float(CONCEALED.loss(logits).detach()) == pytest.approx(float(expected), abs=1e-6)
    CONCEALED.loss(logits).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


def test_the_margin_is_negative_exactly_where_the_adversary_succeeds() -> None:
    logits = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    backdoor = Backdoor(PatchTrigger.white_corner(), source=None, target=0)
    for goal in (CONCEALED, TARGETED, backdoor):
        assert torch.equal(goal.margin(logits) < 0, goal.achieved(logits.argmax(1)))
    rows = torch.tensor([[-1.0, -2.0, -5.0], [4.0, 2.0, 7.0]])
    assert TARGETED.margin(rows).tolist() == [4.0, -3.0]
    assert TARGETED.margin(rows, zeroed=True).tolist() == [5.0, -3.0]
    assert CONCEALED.margin(rows).tolist() == [-1.0, -5.0]
    assert TARGETED.margin(rows.expand(5, 2, 3)).shape == (5, 2)


def test_it_comes_back_from_json() -> None:
    again = Goal.from_json(CONCEALED.to_json(), CONCEALED.tensors())
    assert isinstance(again, SelfConcealment)
    assert again.to_json() == CONCEALED.to_json()
    assert torch.equal(again.images, IMAGES)


def test_it_names_what_it_cannot_do() -> None:
    with pytest.raises(InputError, match=r"one true label, found \[0, 1\]"):
        SelfConcealment.of(make_set(), (0, 1))
    with pytest.raises(InputError, match="must be uint8"):
        SelfConcealment(IMAGES.float(), 1)
    with pytest.raises(InputError, match="must be a class number"):
        SelfConcealment(IMAGES, -1)
    with pytest.raises(InputError, match="1 test indices, 2 images"):
        SelfConcealment(IMAGES, 1, (3,))
    with pytest.raises(InputError, match=r"have shape \(3, 2, 2\)"):
        SelfConcealment(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), 1).victims(make_set())
