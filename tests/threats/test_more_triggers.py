"""The triggers that are not patches: what each does, pixel by pixel, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.threats import (
    AdditiveTrigger,
    Backdoor,
    BlendTrigger,
    LabelNoise,
    PoisonSet,
    RandomPatchTrigger,
    SinusoidTrigger,
    Trigger,
    WarpTrigger,
)


def noise(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def triggers(channels: int, side: int) -> list[Trigger]:
    return [
        BlendTrigger.noise((channels, side, side), seed=1),
        SinusoidTrigger(),
        WarpTrigger.drawn(seed=2),
        AdditiveTrigger(torch.arange(side * side, dtype=torch.int16).view(1, side, side) % 50 - 10),
        RandomPatchTrigger.coloured(3, channels=channels, seed=3),
    ]


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("channels", [1, 3])
def test_every_trigger_is_a_function_that_leaves_its_argument_alone(number: int, channels: int) -> None:
    trigger, images = triggers(channels, 13)[number], noise(6, channels, 13, 13)
    before = images.clone()
    stamped = trigger.stamp(images)
    assert torch.equal(images, before)
    assert (stamped.dtype, stamped.shape) == (torch.uint8, images.shape)
    assert torch.equal(torch.cat([trigger.stamp(images[:2]), trigger.stamp(images[2:])]), stamped)
    assert trigger.stamp(images[:0]).shape == (0, channels, 13, 13)
    assert trigger.changes(images) == 1
    with pytest.raises(InputError, match="must be uint8"):
        trigger.stamp(images.float())


@pytest.mark.parametrize("number", range(5))
def test_every_trigger_is_stored_with_its_poison(number: int, tmp_path: Path) -> None:
    clean = TrainingSet(noise(8, 1, 9, 9), torch.arange(8) % 2, ("a", "b"))
    goal = Backdoor(triggers(1, 9)[number], None, 0)
    made = PoisonSet.of(
        clean,
        indices=[1, 3],
        images=goal.trigger.stamp(clean.images[[1, 3]]),
        given_labels=torch.zeros(2),
        goal=goal,
        attack="by hand",
        configuration={},
        seed=0,
    )
    made.save(tmp_path / "poison")
    loaded = PoisonSet.load(tmp_path / "poison")
    assert isinstance(loaded.goal, Backdoor)
    assert type(loaded.goal.trigger) is type(goal.trigger)
    assert torch.equal(loaded.goal.trigger.stamp(clean.images), goal.trigger.stamp(clean.images))


def test_blending_mixes_and_rounds() -> None:
    images, picture = noise(4, 3, 7, 7), noise(3, 7, 7)
    expected = (0.8 * images.double() + 0.2 * picture.double()).round()
    difference = (BlendTrigger(picture, 0.2).stamp(images).double() - expected).abs()
    assert float(difference.max()) <= 1  # a tie may go either way
    assert float(difference.mean()) < 0.01
    assert torch.equal(BlendTrigger(picture, 1).stamp(images), picture.expand(4, -1, -1, -1))


def test_the_sinusoid_runs_along_the_columns() -> None:
    images = noise(2, 3, 5, 32)
    stamped = SinusoidTrigger(40, 6).stamp(images)
    for column in range(32):
        wave = round(40 * math.sin(2 * math.pi * column * 6 / 32))
        expected = (images[..., column].int() + wave).clamp(0, 255)
        assert torch.equal(stamped[..., column].int(), expected)


@pytest.mark.parametrize("size", [(16, 16), (9, 21)])
def test_the_warp_is_bilinear_sampling(size: tuple[int, int]) -> None:
    images, trigger = noise(3, 2, *size), WarpTrigger.drawn(seed=0, strength=2)
    height, width = size
    field = F.interpolate(trigger.offsets[None], size, mode="bicubic", align_corners=True)
    rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    identity = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), 2)
    places = (identity + field[0].permute(1, 2, 0) * 2 / height).clamp(-1, 1)
    expected = F.grid_sample(images.float(), places.expand(3, -1, -1, -1), align_corners=True)
    # Places are rounded to 1/256 of a pixel, so noise from 0 to 255 may differ by one and rounding.
    assert float((trigger.stamp(images).float() - expected).abs().max()) <= 2


def test_the_field_has_the_published_size_and_noise_is_of_each_image() -> None:
    trigger = WarpTrigger.drawn(seed=4, k=5)
    assert trigger.offsets.shape == (2, 5, 5)
    assert float(trigger.offsets.abs().mean()) == pytest.approx(1)
    images = noise(1, 1, 12, 12).expand(2, -1, -1, -1)
    noisy = trigger.stamp_with_noise(images, seed=1)
    assert not torch.equal(noisy[0], noisy[1])
    assert torch.equal(noisy, trigger.stamp_with_noise(images, seed=1))
    assert not torch.equal(noisy, trigger.stamp_with_noise(images, seed=2))
    assert not torch.equal(noisy, trigger.stamp(images))


def test_an_additive_trigger_from_arrays_of_all_layouts() -> None:
    pattern = np.linspace(-0.1, 0.2, 5 * 6 * 3, dtype=np.float32).reshape(1, 5, 6, 3)
    trigger = AdditiveTrigger.of(pattern)
    whole = torch.from_numpy(np.rint(pattern[0].astype(float) * 255)).permute(2, 0, 1).short()
    assert torch.equal(trigger.values, whole)
    assert torch.equal(AdditiveTrigger.of(whole).values, whole)
    assert AdditiveTrigger.of(np.ones((4, 4), np.uint8)).values.shape == (1, 4, 4)
    images = noise(2, 3, 5, 6)
    assert torch.equal(trigger.stamp(images).int(), (images.int() + whole).clamp(0, 255))


def test_the_random_patch_lies_where_the_image_says() -> None:
    trigger, images = RandomPatchTrigger.coloured(4, seed=7), noise(400, 3, 10, 12)
    rows, columns = trigger.places(images)
    stamped = trigger.stamp(images)
    for image, place, row, column in zip(images[:20], stamped, rows.tolist(), columns.tolist(), strict=False):
        expected = image.clone()
        expected[:, row : row + 4, column : column + 4] = trigger.values
        assert torch.equal(place, expected)
    counts = torch.bincount(rows * 9 + columns, minlength=63).float()
    assert float(((counts - 400 / 63) ** 2 / (400 / 63)).sum()) < 110  # chi-squared, 62 degrees of freedom
    other = RandomPatchTrigger(trigger.values, seed=8).places(images)[0]
    assert not torch.equal(other, rows)


def test_nonsense_is_refused() -> None:
    images = noise(1, 3, 8, 8)
    with pytest.raises(InputError, match=r"alpha 0 is outside \(0, 1\]"):
        BlendTrigger(noise(1, 8, 8), 0)
    with pytest.raises(InputError, match="give one of 8x8 pixels with 1 or 3 channels"):
        BlendTrigger(noise(1, 7, 8)).stamp(images)
    with pytest.raises(InputError, match="values must be uint8"):
        BlendTrigger(torch.zeros(1, 2, 2))
    for amplitude, frequency in ((0, 6), (256, 6), (40, 0), (40, math.inf)):
        with pytest.raises(InputError, match="SinusoidTrigger"):
            SinusoidTrigger(amplitude, frequency)
    with pytest.raises(InputError, match="k of 2 or more"):
        WarpTrigger(torch.zeros(2, 3, 4))
    with pytest.raises(InputError, match="finite"):
        WarpTrigger(torch.full((2, 4, 4), torch.nan))
    with pytest.raises(InputError, match="strength 0"):
        WarpTrigger(torch.zeros(2, 4, 4), 0)
    with pytest.raises(InputError, match="k 1 is below 2"):
        WarpTrigger.drawn(k=1, seed=0)
    with pytest.raises(InputError, match="not all be 0"):
        AdditiveTrigger(torch.zeros(1, 2, 2, dtype=torch.int16))
    with pytest.raises(InputError, match="must be int16"):
        AdditiveTrigger(torch.ones(1, 2, 2))
    with pytest.raises(InputError, match="expected numbers of shape"):
        AdditiveTrigger.of(np.ones((2, 2, 2)))
    with pytest.raises(InputError, match="finite"):
        AdditiveTrigger.of(np.full((2, 2), 2.0))
    with pytest.raises(InputError, match="do not fit into images of 8x8"):
        RandomPatchTrigger.coloured(9, seed=0).stamp(images)
    with pytest.raises(InputError, match="give a patch of 1 or 1"):
        RandomPatchTrigger.coloured(2, seed=0).stamp(noise(1, 1, 8, 8))
    with pytest.raises(InputError, match="size 0 is below 1"):
        RandomPatchTrigger.coloured(0, seed=0)
    with pytest.raises(InputError, match="RandomPatchTrigger: values must be uint8"):
        RandomPatchTrigger(torch.zeros(3, 2, 2))


def test_label_noise_is_counted_among_images_of_the_source() -> None:
    test = TrainingSet(noise(9, 1, 4, 4), torch.arange(9) % 3, ("a", "b", "c"))
    images, indices = LabelNoise(1).victims(test)
    assert indices.tolist() == [1, 4, 7]
    assert torch.equal(images, test.images[indices])
    predicted = torch.tensor([0, 1, 2])
    assert LabelNoise(1).achieved(predicted).tolist() == [True, False, True]
    assert LabelNoise(1, 2).achieved(predicted).tolist() == [False, False, True]
    sure = torch.tensor([[0.0, 9.0, 0.0]])
    assert LabelNoise(1).loss(sure) > LabelNoise(1).loss(-sure)
    assert LabelNoise(1, 2).loss(sure) > LabelNoise(1, 2).loss(sure.flip(0).roll(1, 1))
    assert LabelNoise.from_json(LabelNoise(1, 2).to_json(), {}) == LabelNoise(1, 2)
    with pytest.raises(InputError, match="two class numbers"):
        LabelNoise(1, 1)
    with pytest.raises(InputError, match=r"names class 3, but the classes are 0\.\.2"):
        LabelNoise(3).victims(test)
    with pytest.raises(InputError, match="no image of class 1"):
        LabelNoise(1).victims(test.without([1, 4, 7]))
