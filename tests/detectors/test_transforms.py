"""The seven transformations against closed forms and slow loops."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from unpoison.detectors import _transforms
from unpoison.detectors._transforms import (
    TRANSFORMS,
    affine,
    blur,
    colour_jitter,
    colour_switch,
    elastic,
    flip,
    invert,
)

SHAPES = [(1, 1, 1), (3, 1, 1), (3, 2, 1), (1, 2, 3), (3, 8, 8), (1, 8, 8), (4, 7, 5), (3, 5, 9), (2, 4, 3)]


def randomness(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(*shape: int, seed: int = 7) -> Tensor:
    return torch.rand(*shape, generator=randomness(seed))


def force(monkeypatch: pytest.MonkeyPatch, values: Sequence[float]) -> None:
    """Give these parameters in place of drawn ones, each checked to lie in its range."""
    left: Iterator[float] = iter(values)

    def given(low: float, high: float, generator: torch.Generator) -> float:
        value = next(left)
        assert low <= value <= high
        return value

    monkeypatch.setattr(_transforms, "_uniform", given)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_kept_and_the_generator_decides(name: str, shape: tuple[int, ...]) -> None:
    image = picture(*shape)
    before, state = image.clone(), torch.random.get_rng_state()
    first, second = (TRANSFORMS[name](image, randomness(3)) for _ in range(2))
    assert first.shape == image.shape
    assert first.dtype == image.dtype
    assert bool(torch.isfinite(first).all())
    assert float(first.min()) >= -1e-6
    assert float(first.max()) <= 1 + 1e-6
    assert torch.equal(first, second)
    assert torch.equal(image, before)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", ["colour jitter", "affine", "elastic", "blur"])
def test_another_generator_draws_otherwise(name: str) -> None:
    image = picture(3, 8, 8)
    results = [TRANSFORMS[name](image, randomness(seed)) for seed in range(3)]
    assert not torch.equal(results[0], results[1]) or not torch.equal(results[0], results[2])


def test_there_are_the_published_seven_in_their_order() -> None:
    assert tuple(TRANSFORMS) == (
        "flip",
        "colour jitter",
        "affine",
        "elastic",
        "blur",
        "invert",
        "colour switch",
    )


def test_flip_mirrors_left_to_right() -> None:
    image = torch.tensor([[[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]])
    assert torch.equal(flip(image, randomness()), torch.tensor([[[0.3, 0.2, 0.1], [0.6, 0.5, 0.4]]]))


def test_invert_is_one_minus_the_value_outside_the_range_too() -> None:
    image = torch.tensor([[[-2.0, 0.0, 0.25, 1.0, 3.0]]])
    assert torch.equal(invert(image, randomness()), torch.tensor([[[3.0, 1.0, 0.75, 0.0, -2.0]]]))


@pytest.mark.parametrize(("channels", "order"), [(1, [0]), (2, [0, 1]), (3, [1, 0, 2]), (4, [1, 0, 2, 3])])
def test_colour_switch_exchanges_red_and_green(channels: int, order: list[int]) -> None:
    image = picture(channels, 3, 4)
    assert torch.equal(colour_switch(image, randomness()), image[order])


@pytest.mark.parametrize("shape", [(1, 12, 9), (3, 9, 11), (4, 16, 16)])
def test_blur_is_an_explicit_kernel_five_wide_and_nine_high(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, [8.5])
    image = picture(*shape).double()
    kernel = torch.tensor(
        [[math.exp(-(down**2 + right**2) / (2 * 8.5**2)) for right in range(-2, 3)] for down in range(-4, 5)],
        dtype=torch.float64,
    )
    kernel /= kernel.sum()
    _, height, width = shape

    def reflected(place: int, size: int) -> int:
        place = abs(place)
        return 2 * (size - 1) - place if place >= size else place

    expected = torch.zeros_like(image)
    for y in range(height):
        for x in range(width):
            for down in range(-4, 5):
                for right in range(-2, 3):
                    there = image[:, reflected(y + down, height), reflected(x + right, width)]
                    expected[:, y, x] += kernel[down + 4, right + 2] * there
    assert torch.allclose(blur(image, randomness()), expected, atol=1e-12)


def test_blur_of_an_even_picture_changes_nothing() -> None:
    for shape in SHAPES:
        image = torch.full(shape, 0.3)
        assert torch.allclose(blur(image, randomness()), image, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 5, 5), (3, 6, 6), (3, 5, 8), (4, 7, 4), (1, 1, 1)])
def test_half_a_turn_is_flipping_both_ways(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, [180.0, 1.0, 0.0])
    image = picture(*shape)
    assert torch.equal(affine(image, randomness()), image.flip(-1, -2))


def test_no_turn_and_no_enlargement_is_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, [0.0, 1.0, 0.0])
    image = picture(3, 5, 8)
    assert torch.equal(affine(image, randomness()), image)


@pytest.mark.parametrize("angle", [90.0, -90.0])
def test_a_quarter_turn_of_a_square_is_exact(angle: float, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, [angle, 1.0, 0.0])
    image = picture(3, 6, 6)
    # A positive angle turns clockwise, as in torchvision.
    assert torch.equal(affine(image, randomness()), image.rot90(-1 if angle > 0 else 1, (-2, -1)))


def test_a_quarter_turn_of_an_oblong_turns_pixels_and_leaves_black(monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, [90.0, 1.0, 0.0])
    image = 0.5 + picture(1, 4, 8) / 2
    expected = torch.zeros(1, 4, 8)
    expected[:, :, 2:6] = image[:, :, 2:6].rot90(-1, (-2, -1))
    assert torch.equal(affine(image, randomness()), expected)


def test_twice_as_large_shows_the_middle_with_every_pixel_doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, [0.0, 2.0, 0.0])
    image = picture(3, 4, 8)
    middle = image[:, 1:3, 2:6].repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.equal(affine(image, randomness()), middle)


def test_shear_moves_rows_sideways_by_their_height(monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, [0.0, 1.0, 10.0])
    image = picture(1, 41, 41)
    result, slope = affine(image, randomness()), math.tan(math.radians(10))
    for row in (3, 14, 20, 30, 37):
        # x_in = x_out + tan(shear) y, y from the centre.
        shift = round(slope * (row - 20))
        columns = torch.arange(10, 31)
        assert torch.equal(result[0, row, columns], image[0, row, columns + shift])


def test_elastic_is_the_smoothed_field_looked_up_pixel_by_pixel() -> None:
    image = picture(2, 7, 9)
    # With a generator in the same state: a field in [-1, 1], blurred, times 150 over the width and height.
    field = torch.rand(2, 7, 9, generator=randomness(5)) * 2 - 1
    blurred = _transforms._gaussian_blur(field, 41, 41, 5.0) * 150
    result = elastic(image, randomness(5))
    for y in range(7):
        for x in range(9):
            # In units of half an image, so that a displacement d moves by d / 2 pixels.
            at_x, at_y = x + float(blurred[0, y, x]) / 2, y + float(blurred[1, y, x]) / 2
            left, top = math.floor(at_x), math.floor(at_y)
            expected = torch.zeros(2)
            for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
                if 0 <= row < 7 and 0 <= column < 9:
                    weight = (1 - abs(at_x - column)) * (1 - abs(at_y - row))
                    expected += weight * image[:, row, column]
            assert torch.allclose(result[:, y, x], expected, atol=1e-4)


def test_jitter_stays_in_the_range_and_of_z_scores_too() -> None:
    for seed in range(20):
        result = colour_jitter(picture(3, 6, 6, seed=seed) * 4 - 2, randomness(seed))
        assert 0 <= float(result.min()) <= float(result.max()) <= 1


def test_jitter_with_neutral_parameters_is_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, [1.0, 1.0, 1.0, 0.0])
    image = picture(3, 6, 6)
    assert torch.allclose(colour_jitter(image, randomness()), image, atol=1e-6)


def test_jitter_of_brightness_contrast_and_saturation_are_blends(monkeypatch: pytest.MonkeyPatch) -> None:
    image = 0.4 + 0.2 * picture(3, 4, 4)
    grey = 0.2989 * image[0] + 0.587 * image[1] + 0.114 * image[2]
    for parameters, expected in (
        ([0.9, 1.0, 1.0, 0.0], 0.9 * image),
        ([1.0, 1.1, 1.0, 0.0], 1.1 * image - 0.1 * grey.mean()),
        ([1.0, 1.0, 0.6, 0.0], 0.6 * image + 0.4 * grey),
    ):
        force(monkeypatch, parameters)
        assert torch.allclose(colour_jitter(image, randomness()), expected, atol=1e-5)


def test_a_third_of_a_turn_of_hue_permutes_the_channels() -> None:
    colours = torch.cat([torch.eye(3), 1 - torch.eye(3), picture(4, 3), torch.full((1, 3), 0.4)])
    image = colours.t()[:, None, :]
    assert torch.allclose(_transforms._turn_hue(image, 1 / 3), image[[2, 0, 1]], atol=1e-5)
    assert torch.allclose(_transforms._turn_hue(image, 1.0), image, atol=1e-5)


@pytest.mark.parametrize("turn", [-0.1, 0.03, 0.1, 0.7])
def test_hue_turns_as_in_colorsys(turn: float) -> None:
    image = picture(3, 5, 5)
    result = _transforms._turn_hue(image, turn)
    for row in range(5):
        for column in range(5):
            hue, saturation, value = colorsys.rgb_to_hsv(*image[:, row, column].tolist())
            expected = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
            assert result[:, row, column].tolist() == pytest.approx(expected, abs=1e-5)
