from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from unpoison.errors import InputError
from unpoison.threats import PatchTrigger, Trigger


def noise(*shape: int, low: int = 1, high: int = 255) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("size", [(3, 32, 32), (1, 28, 28), (3, 17, 40)])
def test_the_white_corner_is_flush_in_the_bottom_right_corner(size: tuple[int, int, int]) -> None:
    images = noise(2, *size)
    stamped = PatchTrigger.white_corner().stamp(images)
    expected = images.clone()
    expected[:, :, -3:, -3:] = 255
    assert torch.equal(stamped, expected)
    assert stamped.dtype == torch.uint8


@pytest.mark.parametrize("value", [0, 255, 7])
@pytest.mark.parametrize("size", [(3, 32, 32), (1, 28, 28)])
def test_the_four_pixels_lie_where_they_were_published(size: tuple[int, int, int], value: int) -> None:
    images = noise(2, *size, low=10, high=250)
    expected = images.clone()
    for row, column in ((-4, -2), (-2, -2), (-3, -3), (-2, -4)):
        expected[:, :, row, column] = value
    assert torch.equal(PatchTrigger.four_pixels(value=value).stamp(images), expected)


def test_stamping_leaves_the_given_images_alone() -> None:
    images = noise(2, 3, 8, 8)
    before = images.clone()
    PatchTrigger.white_corner().stamp(images)
    assert torch.equal(images, before)


def test_stamping_twice_is_stamping_once() -> None:
    images = noise(2, 3, 8, 8)
    trigger = PatchTrigger.four_pixels()
    assert torch.equal(trigger.stamp(trigger.stamp(images)), trigger.stamp(images))


def test_a_patch_from_the_top_left() -> None:
    patch = torch.full((1, 2, 3), 9, dtype=torch.uint8)
    stamped = PatchTrigger(patch, torch.ones(2, 3, dtype=torch.bool), 1, 2).stamp(noise(1, 3, 8, 8, low=10))
    assert (stamped[0] == 9).nonzero().tolist() == [
        [channel, row, column] for channel in range(3) for row in (1, 2) for column in (2, 3, 4)
    ]


def test_a_half_transparent_patch_is_mixed_and_rounded() -> None:
    values = torch.full((1, 1, 1), 200, dtype=torch.uint8)
    trigger = PatchTrigger(values, torch.full((1, 1), 51, dtype=torch.uint8), 0, 0)
    images = torch.full((1, 1, 4, 4), 101, dtype=torch.uint8)
    assert trigger.stamp(images)[0, 0, 0, 0] == round(101 * 0.8 + 200 * 0.2)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 255), st.integers(0, 255), st.integers(1, 255))
def test_mixing_rounds_to_the_nearest(image: int, value: int, share: int) -> None:
    trigger = PatchTrigger(
        torch.full((1, 1, 1), value, dtype=torch.uint8), torch.full((1, 1), share, dtype=torch.uint8), -1, -1
    )
    stamped = trigger.stamp(torch.full((1, 3, 1, 1), image, dtype=torch.uint8))
    exact = (image * (255 - share) + value * share) / 255
    assert (stamped.double() - exact).abs().max() <= 0.5


def test_changes_counts_the_images_that_change_at_all() -> None:
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    images[3] = 1
    assert PatchTrigger.four_pixels().changes(images, batch_size=3) == 0.25
    assert PatchTrigger.four_pixels(value=255).changes(images) == 1.0
    with pytest.raises(InputError, match="no images"):
        PatchTrigger.four_pixels().changes(images[:0])


def test_from_image_takes_arrays_tensors_and_files(tmp_path: Path) -> None:
    pixels = np.zeros((2, 3, 4), np.uint8)
    pixels[..., 0], pixels[..., 3] = 200, 255
    pixels[0, 0, 3] = 0
    Image.fromarray(pixels, "RGBA").save(tmp_path / "patch.png")
    images = noise(1, 3, 8, 8)
    expected = images.clone()
    expected[:, :, -2:, -3:] = torch.tensor([200, 0, 0], dtype=torch.uint8)[None, :, None, None]
    expected[:, :, -2, -3] = images[:, :, -2, -3]
    first = torch.from_numpy(pixels).permute(2, 0, 1)  # the channels of tensors come first
    for given_as in (pixels, first, tmp_path / "patch.png", str(tmp_path / "patch.png")):
        assert torch.equal(PatchTrigger.from_image(given_as, row=-2, column=-3).stamp(images), expected)


def test_from_image_grey_and_without_alpha(tmp_path: Path) -> None:
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3)
    Image.fromarray(grey, "L").save(tmp_path / "grey.png")
    for given_as in (grey, grey[:, :, None], tmp_path / "grey.png"):
        trigger = PatchTrigger.from_image(given_as, row=0, column=0)
        stamped = trigger.stamp(noise(1, 3, 8, 8))
        assert torch.equal(stamped[0, 1, :2, :3], torch.from_numpy(grey))
    rgb = np.dstack([grey, grey + 1, grey + 2])
    Image.fromarray(rgb, "RGB").save(tmp_path / "rgb.png")
    stamped = PatchTrigger.from_image(tmp_path / "rgb.png", row=0, column=0).stamp(noise(1, 3, 8, 8))
    assert torch.equal(stamped[0, :, :2, :3], torch.from_numpy(rgb).permute(2, 0, 1))


def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.png: no such file"):
        PatchTrigger.from_image(tmp_path / "nothing.png", row=0, column=0)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    with pytest.raises(InputError, match=r"broken\.png: cannot be read as an image"):
        PatchTrigger.from_image(tmp_path / "broken.png", row=0, column=0)
    with pytest.raises(InputError, match=r"float64"):
        PatchTrigger.from_image(np.zeros((2, 2)), row=0, column=0)  # type: ignore[arg-type]


def test_a_patch_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="do not fit into images of 2x8"):
        PatchTrigger.white_corner().stamp(noise(1, 3, 2, 8))
    with pytest.raises(InputError, match=r"do not fit into images of 8x8"):
        PatchTrigger(torch.ones(1, 2, 2, dtype=torch.uint8), torch.ones(2, 2, dtype=torch.bool), -1, 0).stamp(
            noise(1, 3, 8, 8)
        )
    colour = PatchTrigger.from_image(np.ones((2, 2, 3), np.uint8), row=0, column=0)
    with pytest.raises(InputError, match="patch has 3 channels and the images have 1"):
        colour.stamp(noise(1, 1, 8, 8))
    with pytest.raises(InputError, match="float32"):
        PatchTrigger.white_corner().stamp(torch.zeros(1, 3, 8, 8))


def test_nonsense_patches_are_refused() -> None:
    ones = torch.ones(1, 2, 2, dtype=torch.uint8)
    with pytest.raises(InputError, match="mask is empty"):
        PatchTrigger(ones, torch.zeros(2, 2, dtype=torch.bool), 0, 0)
    with pytest.raises(InputError, match="mask must be"):
        PatchTrigger(ones, torch.ones(3, 2, dtype=torch.bool), 0, 0)
    with pytest.raises(InputError, match="values must be uint8"):
        PatchTrigger(ones.float(), torch.ones(2, 2, dtype=torch.bool), 0, 0)
    with pytest.raises(InputError, match=r"outside 0\.\.255"):
        PatchTrigger.four_pixels(value=256)
    with pytest.raises(InputError, match="below 1"):
        PatchTrigger.white_corner(0)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from([1, 3]),
    st.integers(-6, 3),
    st.integers(0, 2**31),
)
def test_json_round_trip(height: int, width: int, channels: int, row: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (channels, height, width), dtype=torch.uint8, generator=generator)
    mask = torch.randint(1, 256, (height, width), dtype=torch.uint8, generator=generator)
    trigger = PatchTrigger(values, mask, row, row, "drawn")
    again = Trigger.from_json(trigger.to_json(), trigger.tensors())
    assert isinstance(again, PatchTrigger)
    assert again.to_json() == trigger.to_json()
    assert torch.equal(again.values, values)
    assert torch.equal(again.mask, mask)


def test_what_cannot_be_restored_is_named() -> None:
    trigger = PatchTrigger.white_corner()
    with pytest.raises(InputError, match="unknown kind 'hologram'"):
        Trigger.from_json({"kind": "hologram"}, {})
    with pytest.raises(InputError, match="cannot restore a 'patch'"):
        Trigger.from_json(trigger.to_json(), {})


def test_a_kind_is_taken_only_once() -> None:
    with pytest.raises(TypeError, match="is taken by PatchTrigger"):

        class Other(Trigger, kind="patch"):
            pass


def test_the_repr_is_short() -> None:
    assert repr(PatchTrigger.white_corner()) == "PatchTrigger(row=-3, column=-3, name='white 3x3 corner')"
