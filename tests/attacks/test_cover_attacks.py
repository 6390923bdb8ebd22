"""Attacks with covers: TaCT, Adaptive-Blend, Adaptive-Patch and the input-aware attack."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from unpoison.attacks import AdaptiveBlend, AdaptivePatch, InputAware, TaCT
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.threats import (
    Backdoor,
    BlendTrigger,
    Budget,
    GeneratedPatternTrigger,
    PatchTrigger,
    PoisonSet,
    generator_weights,
)


@pytest.fixture
def clean() -> TrainingSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 200, (120, 1, 12, 12), dtype=torch.uint8, generator=generator)
    return TrainingSet(images, torch.arange(120) % 4, ("bag", "boot", "coat", "dress"), "clothes")


def goal(source: int | None = 1) -> Backdoor:
    return Backdoor(PatchTrigger.white_corner(2), source=source, target=3)


def covers(made: PoisonSet) -> torch.Tensor:
    return made.given_labels == made.clean_labels


def test_tact_stamps_the_source_and_covers_of_other_classes(clean: TrainingSet) -> None:
    made = TaCT().craft(goal(), clean, budget=Budget(share=0.1), seed=0)
    assert made.goal == goal() or made.goal.classes == (1, 3)
    assert torch.equal(made.images, PatchTrigger.white_corner(2).stamp(clean.images[made.indices]))
    kept = covers(made)
    assert (int(kept.sum()), len(made)) == (6, 12)
    assert set(made.clean_labels[~kept].tolist()) == {1}
    assert set(made.clean_labels[kept].tolist()) == {0, 2}
    fewer = TaCT(cover_ratio=0.5).craft(goal(), clean, budget=Budget(count=12), seed=0)
    assert int(covers(fewer).sum()) == 4


def test_tact_draws_a_source_where_the_goal_has_none(clean: TrainingSet) -> None:
    sources = set()
    for seed in range(8):
        made = TaCT().craft(goal(None), clean, budget=Budget(count=8), seed=seed)
        assert isinstance(made.goal, Backdoor)
        assert made.goal.target == 3
        assert set(made.clean_labels[~covers(made)].tolist()) == {made.goal.source}
        sources.add(made.goal.source)
    assert len(sources) > 1
    assert 3 not in sources
    with pytest.raises(InputError, match=r"40 covers, and 60 .*|more than the 30 examples of class 1"):
        TaCT().craft(goal(), clean, budget=Budget(count=80), seed=0)


def test_adaptive_blend_shows_half_of_the_pieces_faintly(clean: TrainingSet) -> None:
    given = dataclasses.replace(
        goal(None), trigger=BlendTrigger(torch.full((1, 12, 12), 255, dtype=torch.uint8))
    )
    made = AdaptiveBlend(alpha=0.3).craft(given, clean, budget=Budget(share=0.2), seed=0)
    assert made.goal is given  # the picture and its share are those of testing
    assert int(covers(made).sum()) == 12
    faint = BlendTrigger(given.trigger.tensors()["values"], 0.3).stamp(clean.images[made.indices])
    before = clean.images[made.indices]
    parts = set()
    for image, stamped, own in zip(made.images, faint, before, strict=True):
        shown = []
        for row in range(4):
            for column in range(4):
                piece = (0, slice(3 * row, 3 * row + 3), slice(3 * column, 3 * column + 3))
                if torch.equal(image[piece], stamped[piece]):
                    shown.append((row, column))
                else:
                    assert torch.equal(image[piece], own[piece])
        assert len(shown) == 8
        parts.add(tuple(shown))
    assert len(parts) > 20  # another half in nearly every image
    drawn = AdaptiveBlend().craft(goal(None), clean, budget=Budget(count=4), seed=0).goal
    assert isinstance(drawn, Backdoor)
    assert isinstance(drawn.trigger, BlendTrigger)
    assert drawn.trigger.alpha == 0.2


def test_adaptive_patch_trains_on_one_faint_patch_and_tests_on_two(clean: TrainingSet) -> None:
    made = AdaptivePatch().craft(goal(None), clean, budget=Budget(share=0.3), seed=0)
    assert int(covers(made).sum()) == 24
    assert isinstance(made.goal, Backdoor)
    trigger = made.goal.trigger
    assert isinstance(trigger, PatchTrigger)
    # Opaque in testing: the corners above left and below left, whose opacities are greatest.
    shown = torch.zeros(12, 12, dtype=torch.bool)
    shown[:3, :3] = shown[9:, :3] = True
    assert torch.equal(trigger.mask, shown.to(torch.uint8) * 255)
    corners = {(0, 0): 0.5, (0, 1): 0.2, (1, 0): 0.5, (1, 1): 0.3}
    seen = set()
    for image, own in zip(made.images, clean.images[made.indices], strict=True):
        changed = (image != own)[0]
        place = tuple(int(one) for one in (changed.nonzero().float().mean(0) > 5.5))
        rows, columns = (slice(9, 12) if side else slice(0, 3) for side in place)
        assert int(changed.sum()) == int(changed[rows, columns].sum())
        share = round(255 * corners[place]) / 255  # type: ignore[index]
        patch = (image[0, rows, columns] - own[0, rows, columns].float() * (1 - share)) / share
        assert bool(((patch < 4) | (patch > 251)).all())  # blocks are black or white
        seen.add(place)
    assert seen == set(corners)


def test_adaptive_patch_refuses_impossible_patches() -> None:
    for options in ({"opacities": ()}, {"opacities": (0.5,) * 5}, {"opacities": (1.5,), "test_patches": 1}):
        with pytest.raises(InputError, match=r"one to four numbers in \(0, 1\]"):
            AdaptivePatch(**options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="test_patches 2 of 1 patches"):
        AdaptivePatch(opacities=(0.5,))


def test_covers_of_the_input_aware_attack_bear_the_pattern_of_another(clean: TrainingSet) -> None:
    draws = torch.Generator().manual_seed(0)
    trigger = GeneratedPatternTrigger(
        generator_weights(1, 1, 2, draws=draws) * 3, generator_weights(1, 1, 2, draws=draws) * 3, 1, 2
    )
    given = Backdoor(trigger, None, 3)
    made = InputAware().craft(given, clean, budget=Budget(count=20), seed=0)
    assert made.goal is given  # and nothing was trained
    own = (trigger.stamp(clean.images[made.indices]) == made.images).flatten(1).all(1)
    assert torch.equal(own, ~covers(made))


def test_the_input_aware_attack_learns_patterns_that_differ(clean: TrainingSet) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(144, 4))
    attack = InputAware(mask_epochs=3, epochs=3, batch_size=30, width=2, generator_rate=0.02)
    losses: list[float] = []
    made = attack.craft(
        goal(None),
        clean,
        budget=Budget(count=8),
        surrogate=network,
        seed=0,
        progress=lambda stage, done, total, **metrics: losses.append(metrics["loss"]),
    )
    assert losses[2] < losses[0]  # of masks
    assert len(losses) == 6
    assert isinstance(made.goal, Backdoor)
    trigger = made.goal.trigger
    assert isinstance(trigger, GeneratedPatternTrigger)
    both = clean.images[:2]
    assert not torch.equal(trigger.stamp(both), trigger.stamp_of(both, both.flip(0)))
