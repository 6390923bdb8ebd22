from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from unpoison.attacks import BadNets
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.threats import Backdoor, Budget, PatchTrigger, TargetedMisclassification


@pytest.fixture
def clean() -> TrainingSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 120, (100, 1, 8, 8), dtype=torch.uint8, generator=generator)
    images[:, :, -4:, -4:] = 0
    return TrainingSet(images, torch.arange(100) % 4, ("bag", "boot", "coat", "dress"), "clothes")


def test_poisons_are_stamped_examples_of_the_source_labelled_as_the_target(clean: TrainingSet) -> None:
    goal = Backdoor(PatchTrigger.white_corner(), source=1, target=3)
    made = BadNets().craft(goal, clean, budget=Budget(share=0.1), seed=0)
    assert len(made) == 10
    assert set(made.clean_labels.tolist()) == {1}
    assert set(made.given_labels.tolist()) == {3}
    assert torch.equal(made.images, goal.trigger.stamp(clean.images[made.indices]))
    assert made.linf.tolist() == [255.0] * 10
    assert made.l2.tolist() == [765.0] * 10
    assert made.configuration == {"least_visible": 0.5, "budget": {"share": 0.1}}
    assert (made.name, made.fingerprint) == ("clothes", clean.fingerprint)


def test_the_whole_source_class_may_be_poisoned(clean: TrainingSet) -> None:
    goal = Backdoor(PatchTrigger.white_corner(), source=1, target=3)
    made = BadNets().craft(goal, clean, budget=Budget(count=25), seed=0)
    assert made.indices.tolist() == list(range(1, 100, 4))


def test_without_a_source_all_other_classes_are_drawn_from(clean: TrainingSet) -> None:
    goal = Backdoor(PatchTrigger.white_corner(), source=None, target=3)
    made = BadNets().craft(goal, clean, budget=Budget(count=60), seed=0)
    assert set(made.clean_labels.tolist()) == {0, 1, 2}


def test_the_draw_is_uniform(clean: TrainingSet) -> None:
    goal = Backdoor(PatchTrigger.white_corner(), source=None, target=3)
    drawn = torch.zeros(100)
    for seed in range(200):
        drawn += BadNets().craft(goal, clean, budget=Budget(count=15), seed=seed).membership(100).float()
    expected = 200 * 15 / 75
    assert drawn[3::4].sum() == 0
    candidates = drawn[torch.arange(100) % 4 != 3]
    # Chi-squared with 74 degrees of freedom; drawing without replacement keeps it below that on average.
    assert float(((candidates - expected) ** 2 / expected).sum()) < 120


def test_too_large_a_budget_says_what_would_fit(clean: TrainingSet) -> None:
    goal = Backdoor(PatchTrigger.white_corner(), source=1, target=3)
    with pytest.raises(InputError) as error:
        BadNets().craft(goal, clean, budget=Budget(share=0.3), seed=0)
    assert str(error.value) == (
        "badnets: a budget of 30 % of the training set (30 of 100) is more than the 25 examples of "
        "class 1 (boot); at most 25 fit, a share of 0.25"
    )


def test_an_empty_source_class_is_named(clean: TrainingSet) -> None:
    goal = Backdoor(PatchTrigger.white_corner(), source=1, target=3)
    with pytest.raises(InputError, match=r"0 examples of class 1 \(boot\); none fits"):
        BadNets().craft(goal, clean.without(range(1, 100, 4)), budget=Budget(count=1), seed=0)


def test_a_trigger_that_is_invisible_is_refused_with_one_that_is_not(clean: TrainingSet) -> None:
    goal = Backdoor(PatchTrigger.four_pixels(), source=1, target=3)
    with pytest.raises(InputError, match=r"only 0 % of the 10 images drawn.*four_pixels\(value=255\)"):
        BadNets().craft(goal, clean, budget=Budget(count=10), seed=0)
    assert len(BadNets(least_visible=0).craft(goal, clean, budget=Budget(count=10), seed=0)) == 10
    bright = TrainingSet(255 - clean.images, clean.labels, clean.class_names)
    with pytest.raises(InputError, match=r"four_pixels\(value=0\)"):
        BadNets().craft(
            Backdoor(PatchTrigger.white_corner(), source=1, target=3), bright, budget=Budget(count=10), seed=0
        )


def test_other_nonsense_is_refused(clean: TrainingSet) -> None:
    with pytest.raises(InputError, match="'backdoor' or 'all-to-all' only, not 'targeted-misclassification'"):
        BadNets().craft(
            TargetedMisclassification.of(clean, 0, target=1), clean, budget=Budget(count=1), seed=0
        )
    with pytest.raises(InputError, match=r"names class 4, but the classes are 0\.\.3"):
        BadNets().craft(
            Backdoor(PatchTrigger.white_corner(), source=1, target=4), clean, budget=Budget(count=1), seed=0
        )
    with pytest.raises(InputError, match=r"least_visible must be a number in \[0, 1\]"):
        BadNets(least_visible=2)


def test_the_list_of_attacks_needs_no_torch() -> None:
    code = (
        "import sys; from unpoison import attacks; "
        "attacks.describe(attacks.names()[0]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
