"""Triggers that a network makes: the same bytes alone and in a batch, within eps, saved and loaded."""

from __future__ import annotations

import pytest
import torch

from unpoison.errors import InputError
from unpoison.threats import (
    GeneratedNoiseTrigger,
    GeneratedPatternTrigger,
    Trigger,
    generator_weights,
    mask_of,
    noise_of,
    pattern_of,
)


def weights(channels: int, outputs: int, *, scale: float = 3.0) -> torch.Tensor:
    return generator_weights(channels, outputs, 2, draws=torch.Generator().manual_seed(0)) * scale


def images(channels: int, side: int = 7, n: int = 5) -> torch.Tensor:
    draws = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (n, channels, side, side), generator=draws).to(torch.uint8)


def triggers(channels: int) -> tuple[Trigger, Trigger]:
    made = weights(channels, channels)
    noise = GeneratedNoiseTrigger(made, channels, 2, eps=9.5, low_pass=0.5)
    return noise, GeneratedPatternTrigger(made, weights(channels, 1), channels, 2)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_gets_the_same_bytes_alone_and_in_a_batch(channels: int) -> None:
    for trigger in triggers(channels):
        stamped = trigger.stamp(images(channels))
        alone = torch.cat([trigger.stamp(one[None]) for one in images(channels)])
        assert torch.equal(stamped, alone)
        assert trigger.changes(images(channels)) == 1
        restored = Trigger.from_json(trigger.to_json(), trigger.tensors())
        assert torch.equal(restored.stamp(images(channels)), stamped)
        assert trigger.stamp(images(channels)[:0]).shape == (0, channels, 7, 7)
        with pytest.raises(InputError, match=f"made for images of {channels} channels, found 2"):
            trigger.stamp(images(2))


def test_noise_is_within_eps_without_high_frequencies_and_by_image() -> None:
    trigger, _ = triggers(1)
    grey = images(1, n=6).clamp(20, 230)
    change = trigger.stamp(grey).int() - grey.int()
    assert 0 < int(change.abs().max()) <= 9
    assert not torch.equal(change[0], change[1])
    noise = noise_of(grey.double() / 255, weights(1, 1).double(), width=2, low_pass=0.5)
    places = torch.arange(7, dtype=torch.float64)
    for frequency in (5, 6):  # of seven, half are kept
        wave = torch.cos(torch.pi / 7 * frequency * (places + 0.5))
        if float(noise.abs().max()) < 1:  # where nothing was cut off
            assert float((noise @ wave).abs().max()) < 1e-9
            assert float((wave @ noise).abs().max()) < 1e-9


def test_the_pattern_is_mixed_by_the_mask_pixel_by_pixel() -> None:
    _, trigger = triggers(1)
    assert isinstance(trigger, GeneratedPatternTrigger)
    grey, others = images(1), images(1).flip(0)
    stamped = trigger.stamp_of(grey, others)
    mask = mask_of(others.double() / 255, trigger.mask_weights.double(), width=2)
    pattern = pattern_of(others.double() / 255, trigger.weights.double(), width=2)
    for image in range(len(grey)):
        for row in range(7):
            for column in range(7):
                share = float(mask[image, 0, row, column])
                mixed = float(grey[image, 0, row, column]) * (1 - share)
                mixed += 255 * float(pattern[image, 0, row, column]) * share
                assert int(stamped[image, 0, row, column]) == pytest.approx(mixed, abs=0.5 + 1e-6)
    assert torch.equal(trigger.stamp(grey), trigger.stamp_of(grey, grey))


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"weights must be \d+ finite numbers"):
        GeneratedNoiseTrigger(weights(1, 1)[:-1], 1, 2, eps=8)
    with pytest.raises(InputError, match=r"weights must be \d+ finite numbers"):
        GeneratedPatternTrigger(weights(1, 1), weights(1, 1) * torch.nan, 1, 2)
    for eps, low_pass in ((0.5, 1.0), (8, 0.0)):
        with pytest.raises(InputError, match=r"eps must be in \[1, 255\] and low_pass in \(0, 1\]"):
            GeneratedNoiseTrigger(weights(1, 1), 1, 2, eps=eps, low_pass=low_pass)
