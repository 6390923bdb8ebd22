"""Goals that want something else of each class: all-to-all backdoors and availability."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from unpoison import workflow
from unpoison.attacks import BadNets
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.threats import (
    AllToAll,
    Availability,
    Backdoor,
    Budget,
    Goal,
    PatchTrigger,
    PoisonSet,
    make_goal,
)

CORNER = PatchTrigger.white_corner(2)
NAMES = ("ant", "bee", "cow")


def make_set(n: int = 30) -> TrainingSet:
    images = torch.randint(0, 200, (n, 1, 6, 6), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(n) % 3
    images[:, 0, 0, 0] = labels * 50  # which tells the class
    return TrainingSet(images.to(torch.uint8), labels, NAMES, "beasts")


class Obedient(nn.Module):
    """Reads the class off the first pixel; gives the next where the corner is white, for some classes."""

    def __init__(self, *obeys: int) -> None:
        super().__init__()
        self.obeys = torch.tensor(obeys, dtype=torch.int64)

    def forward(self, images: Tensor) -> Tensor:
        own = (images[:, 0, 0, 0] * 255 / 50).round().long()
        moved = (images[:, 0, -1, -1] == 1) & torch.isin(own, self.obeys)
        return nn.functional.one_hot(torch.where(moved, (own + 1) % 3, own), 3).float() * 5


def test_success_is_counted_class_by_class() -> None:
    test_set, goal = make_set(), AllToAll(CORNER, 3)
    images, places = goal.victims(test_set)
    assert torch.equal(images, CORNER.stamp(test_set.images))
    for obeys in ((), (1,), (0, 2), (0, 1, 2)):
        # The oracle: image by image.
        hits = 0
        for image, place in zip(images, places.tolist(), strict=True):
            answer = int(Obedient(*obeys)(image[None] / 255).argmax())
            hits += answer == (int(test_set.labels[place]) + 1) % 3
        assert goal.success(Obedient(*obeys), test_set).successes == hits == 10 * len(obeys)


def test_availability_is_the_error_on_the_test_set() -> None:
    test_set = make_set()
    always_bee = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    with torch.no_grad():
        always_bee[1].weight.zero_()
        always_bee[1].bias.copy_(torch.tensor([0.0, 9.0, 0.0]))
    assert Availability().success(always_bee, test_set).rate == pytest.approx(2 / 3)
    assert Availability().success(Obedient(), test_set).rate == 0
    accuracy = workflow.measure(always_bee, test_set).clean_accuracy
    assert accuracy.successes + Availability().success(always_bee, test_set).successes == 30


@pytest.mark.parametrize("goal", [AllToAll(CORNER, 3), Availability()])
def test_loss_and_margin_fall_where_the_goal_is_achieved(goal: Goal) -> None:
    draws = torch.Generator().manual_seed(1)
    logits, own = torch.randn(40, 3, generator=draws), torch.randint(3, (40,), generator=draws)
    achieved = goal.achieved(logits.argmax(1), own)
    assert torch.equal(goal.margin(logits, own) < 0, achieved)
    assert goal.margin(logits.expand(5, 40, 3), own).shape == (5, 40)
    sharp = logits * 20
    assert goal.loss(sharp[achieved], own[achieved]) < goal.loss(sharp[~achieved], own[~achieved])
    # By the definition, row by row.
    probabilities = logits.double().softmax(1)
    losses = [
        -float(row[(label + 1) % 3].log() if isinstance(goal, AllToAll) else (1 - row[label]).log())
        for row, label in zip(probabilities, own.tolist(), strict=True)
    ]
    assert float(goal.loss(logits, own)) == pytest.approx(sum(losses) / 40, rel=1e-4)
    for read in (goal.achieved, goal.loss):
        with pytest.raises(InputError, match="depends on the class; give own="):
            read(logits)


def test_margins_of_other_goals_do_not_depend_on_the_class() -> None:
    logits, own = torch.randn(7, 3, generator=torch.Generator().manual_seed(2)), torch.arange(7) % 3
    goal = Backdoor(CORNER, None, 1)
    assert torch.equal(goal.margin(logits, own), goal.margin(logits))


def test_an_all_to_all_backdoor_is_crafted_observed_and_kept(tmp_path: Path) -> None:
    clean, goal = make_set(60), AllToAll(CORNER, 3)
    made = BadNets().craft(goal, clean, budget=Budget(share=0.5), seed=0)
    assert torch.equal(made.given_labels, (made.clean_labels + 1) % 3)
    assert set(made.clean_labels.tolist()) == {0, 1, 2}
    assert torch.equal(made.images, CORNER.stamp(clean.images[made.indices]))
    made.save(tmp_path / "poison")
    loaded = PoisonSet.load(tmp_path / "poison").goal
    assert isinstance(loaded, AllToAll)
    assert loaded.success(Obedient(0, 1, 2), clean) == goal.success(Obedient(0, 1, 2), clean)
    seen = workflow.observe(Obedient(2), goal, make_set(), count=4)
    assert seen is not None
    assert (seen.predicted, seen.true_label, len(seen)) == (0, 2, 4)
    assert workflow.observe(Obedient(), goal, make_set()) is None
    wrong = workflow.observe(Obedient(0, 1, 2), Availability(), make_set())
    assert wrong is None  # nothing is wrong without the trigger


def test_fewer_classes_are_stamped_and_more_are_refused() -> None:
    two = AllToAll(CORNER, 2)
    assert set(make_set().labels[two.victims(make_set())[1]].tolist()) == {0, 1}
    with pytest.raises(InputError, match=r"names class 3, but the classes are 0\.\.2"):
        AllToAll(CORNER, 4).victims(make_set())
    with pytest.raises(InputError, match="two classes or more, found 1"):
        AllToAll(CORNER, 1)
    with pytest.raises(InputError, match=r"no image of the classes 0\.\.1"):
        two.victims(make_set().subset([2]))
    with pytest.raises(InputError, match="no image to measure on"):
        Availability().victims(make_set().subset([]))


def test_plain_values_make_them_only_where_they_are_named() -> None:
    both = ("backdoor", "all-to-all")
    made = make_goal(both, "all-to-all", class_names=NAMES, trigger="white-corner")
    assert isinstance(made, AllToAll)
    assert made.num_classes == 3
    assert isinstance(make_goal(("availability",), class_names=NAMES), Availability)
    with pytest.raises(InputError, match="--target: the goal 'backdoor' needs it"):
        make_goal(both, class_names=NAMES, options={"target": "--target"})
    with pytest.raises(InputError, match="source: the goal 'all-to-all' has no use for it"):
        make_goal(both, "all-to-all", class_names=NAMES, source=1)
