"""Attacks that stamp: what each stamps, what it labels, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unpoison.attacks import Blended, Sig, SmoothTrigger, WaNet
from unpoison.attacks.smooth_trigger import _deepfool
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.threats import (
    AdditiveTrigger,
    Backdoor,
    BlendTrigger,
    Budget,
    PatchTrigger,
    SinusoidTrigger,
    WarpTrigger,
)


@pytest.fixture
def clean() -> TrainingSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 200, (120, 1, 12, 12), dtype=torch.uint8, generator=generator)
    return TrainingSet(images, torch.arange(120) % 4, ("bag", "boot", "coat", "dress"), "clothes")


def goal(*, source: int | None = 1) -> Backdoor:
    return Backdoor(PatchTrigger.white_corner(2), source=source, target=3)


def linear(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(144, 4))


def test_blended_mixes_noise_of_its_own_or_the_picture_given(clean: TrainingSet) -> None:
    made = Blended().craft(goal(), clean, budget=Budget(share=0.1), seed=0)
    assert isinstance(made.goal, Backdoor)
    trigger = made.goal.trigger
    assert isinstance(trigger, BlendTrigger)
    assert trigger.alpha == 0.2
    assert (set(made.clean_labels.tolist()), set(made.given_labels.tolist())) == ({1}, {3})
    assert torch.equal(made.images, trigger.stamp(clean.images[made.indices]))
    other = Blended().craft(goal(), clean, budget=Budget(share=0.1), seed=1).goal
    assert isinstance(other, Backdoor)
    assert not torch.equal(other.trigger.tensors()["values"], trigger.values)
    given = Backdoor(BlendTrigger(torch.full((1, 12, 12), 255, dtype=torch.uint8), 0.5), None, 3)
    assert Blended().craft(given, clean, budget=Budget(count=80), seed=0).goal is given
    with pytest.raises(InputError, match=r"alpha must be a number in \(0, 1\], found 2"):
        Blended(alpha=2)


def test_sig_stripes_the_target_class_and_keeps_labels(clean: TrainingSet) -> None:
    made = Sig(frequency=3.5).craft(goal(), clean, budget=Budget(share=0.05), seed=0)
    assert set(made.clean_labels.tolist()) == set(made.given_labels.tolist()) == {3}
    assert isinstance(made.goal, Backdoor)
    assert made.goal.trigger == SinusoidTrigger(40, 3.5)
    assert (made.goal.source, made.goal.target) == (1, 3)
    assert float(made.linf.max()) <= 40
    given = Backdoor(SinusoidTrigger(20, 2), None, 3)
    assert Sig().craft(given, clean, budget=Budget(count=1), seed=0).goal is given
    with pytest.raises(InputError, match=r"is more than the 30 examples of the target class 3 \(dress\)"):
        Sig().craft(goal(), clean, budget=Budget(share=0.5), seed=0)
    with pytest.raises(InputError, match="6 periods change nothing in images 12 pixels wide"):
        Sig().craft(goal(), clean, budget=Budget(count=1), seed=0)
    with pytest.raises(InputError, match=r"amplitude must be a number in \(0, 255\], found 0"):
        Sig(amplitude=0)


def test_wanets_budget_is_shared_by_poisons_and_covers(clean: TrainingSet) -> None:
    made = WaNet().craft(goal(source=None), clean, budget=Budget(share=0.3), seed=0)
    covers = made.given_labels == made.clean_labels
    assert (len(made), int((~covers).sum()), int(covers.sum())) == (36, 12, 24)
    assert set(made.given_labels[~covers].tolist()) == {3}
    assert 3 not in made.clean_labels[~covers]
    assert set(made.clean_labels[covers].tolist()) == {0, 1, 2, 3}
    assert isinstance(made.goal, Backdoor)
    trigger = made.goal.trigger
    assert isinstance(trigger, WarpTrigger)
    stamped = trigger.stamp(clean.images[made.indices])
    same = (stamped == made.images).flatten(1).all(1)
    assert torch.equal(same, ~covers)


def test_wanet_without_covers_and_with_a_field_given(clean: TrainingSet) -> None:
    given = Backdoor(WarpTrigger.drawn(k=6, strength=2, seed=9), 1, 3)
    made = WaNet(cover_ratio=0).craft(given, clean, budget=Budget(count=30), seed=0)
    assert made.goal is given
    assert made.indices.tolist() == list(range(1, 120, 4))
    assert set(made.given_labels.tolist()) == {3}
    with pytest.raises(InputError, match=r"more than the 30 examples of class 1 \(boot\)"):
        WaNet(cover_ratio=0).craft(given, clean, budget=Budget(count=31), seed=0)
    with pytest.raises(InputError, match="cover_ratio must be a number of at least 0, found -1"):
        WaNet(cover_ratio=-1)
    with pytest.raises(InputError, match="k must be a whole number of at least 2, found 1"):
        WaNet(k=1)


def test_deepfool_finds_the_nearest_boundary_of_a_linear_network() -> None:
    network = linear()
    images = torch.rand(5, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    layer = network[1]  # type: ignore[index]
    change = _deepfool(network.requires_grad_(False), images, 5)
    logits = network(images)
    for row in range(5):
        first = int(logits[row].argmax())
        distances = [
            float((logits[row, first] - logits[row, k]) / (layer.weight[first] - layer.weight[k]).norm())
            for k in range(4)
            if k != first
        ]
        assert float(change[row].norm()) == pytest.approx(min(distances), rel=0.05, abs=1e-3)
        assert int(network(images[row : row + 1] + change[row])[0].argmax()) != first


def test_the_smooth_trigger_is_smooth_in_range_and_part_of_the_goal(clean: TrainingSet) -> None:
    attack = SmoothTrigger(rounds=3, steps=3)
    made = attack.craft(goal(), clean, budget=Budget(share=0.1), surrogate=linear(), seed=0)
    assert isinstance(made.goal, Backdoor)
    trigger = made.goal.trigger
    assert isinstance(trigger, AdditiveTrigger)
    assert (int(trigger.values.min()), int(trigger.values.max())) == (0, 51)
    values = trigger.values.float()
    for dimension in (1, 2):  # noise stretched to the same range would step by 17 on average
        assert float(values.diff(dim=dimension).abs().mean()) < 8
    assert torch.equal(made.images, trigger.stamp(clean.images[made.indices]))
    assert (set(made.clean_labels.tolist()), set(made.given_labels.tolist())) == ({1}, {3})
    assert torch.equal(trigger.values, attack.generate(linear(), clean, seed=0).values)


def test_a_smooth_trigger_that_is_given_needs_no_surrogate(clean: TrainingSet) -> None:
    given = Backdoor(AdditiveTrigger.of(torch.linspace(0, 0.2, 144).view(12, 12)), 1, 3)
    assert SmoothTrigger().craft(given, clean, budget=Budget(count=3), seed=0).goal is given


def test_a_surrogate_that_answers_always_the_same_is_refused(clean: TrainingSet) -> None:
    network = linear()
    with torch.no_grad():
        network[1].weight.zero_()  # type: ignore[index, union-attr]
    with pytest.raises(InputError, match="do not depend on its inputs"):
        SmoothTrigger().craft(goal(), clean, budget=Budget(count=3), surrogate=network, seed=0)


@pytest.mark.parametrize(
    "options",
    [{"reach": 0.2}, {"fooling": 0}, {"images": 0}, {"rounds": 0}, {"steps": 0}, {"width": 0}, {"kernel": 0}],
)
def test_impossible_options_of_the_smooth_trigger(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"smooth-trigger: {next(iter(options))}"):
        SmoothTrigger(**options)  # type: ignore[arg-type]
