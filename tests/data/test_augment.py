from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unpoison.data import augment
from unpoison.errors import InputError


def oracle(
    images: Tensor, flip: bool, crop_padding: int, cutout: int, fill: float, generator: torch.Generator
) -> Tensor:
    """Pixel by pixel, with the same draws in the same order."""
    n, _, height, width = images.shape

    def reflected(position: int, size: int) -> int:
        if position < 0:
            position = -position
        return position if position < size else 2 * (size - 1) - position

    shifts = torch.zeros(2, n, dtype=torch.int64)
    if crop_padding:
        shifts = torch.randint(2 * crop_padding + 1, (2, n, 1), generator=generator)[..., 0] - crop_padding
    mirrored = torch.randint(2, (n, 1), generator=generator)[:, 0] if flip else torch.zeros(n)
    centres = torch.rand((2, n, 1), generator=generator)[..., 0] if cutout else torch.zeros(2, n)
    result = torch.empty_like(images)
    for i in range(n):
        top = int(centres[0, i] * height) - cutout // 2
        left = int(centres[1, i] * width) - cutout // 2
        for y in range(height):
            for x in range(width):
                from_x = width - 1 - x if mirrored[i] else x
                pixel = images[
                    i,
                    :,
                    reflected(y + int(shifts[0, i]), height),
                    reflected(from_x + int(shifts[1, i]), width),
                ]
                if top <= y < top + cutout and left <= x < left + cutout:
                    pixel = torch.full_like(pixel, fill if images.is_floating_point() else round(255 * fill))
                result[i, :, y, x] = pixel
    return result


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 4),
    st.sampled_from([1, 3]),
    st.integers(3, 7),
    st.integers(3, 7),
    st.booleans(),
    st.integers(0, 2),
    st.integers(0, 4),
    st.sampled_from([0.0, 0.4]),
    st.booleans(),
    st.integers(0, 999),
)
def test_equals_the_pixel_by_pixel_oracle(
    n: int,
    channels: int,
    height: int,
    width: int,
    flip: bool,
    padding: int,
    cutout: int,
    fill: float,
    whole: bool,
    seed: int,
) -> None:
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, channels, height, width), generator=draw, dtype=torch.uint8)
    given_images = images if whole else images.float() / 255
    result = augment(
        given_images,
        flip=flip,
        crop_padding=padding,
        cutout=cutout,
        cutout_fill=fill,
        generator=torch.Generator().manual_seed(seed),
    )
    expected = oracle(given_images, flip, padding, cutout, fill, torch.Generator().manual_seed(seed))
    assert result.dtype == given_images.dtype
    assert torch.equal(result, expected)


def test_gradients_flow_to_every_pixel_that_is_shown() -> None:
    images = torch.rand(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)

    def augmented(pixels: Tensor) -> Tensor:
        return augment(
            pixels, flip=True, crop_padding=2, cutout=2, generator=torch.Generator().manual_seed(3)
        )

    assert torch.autograd.gradcheck(augmented, images)
    assert torch.autograd.gradgradcheck(augmented, images)


def test_same_seed_same_images_and_each_image_its_own_draws() -> None:
    images = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8).expand(64, -1, -1, -1)
    first = augment(images, flip=True, crop_padding=4, generator=torch.Generator().manual_seed(1))
    second = augment(images, flip=True, crop_padding=4, generator=torch.Generator().manual_seed(1))
    other = augment(images, flip=True, crop_padding=4, generator=torch.Generator().manual_seed(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert len(first.flatten(1).unique(dim=0)) > 30


def test_global_randomness_and_the_input_are_left_alone() -> None:
    images = torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8)
    before, state = images.clone(), torch.get_rng_state()
    augment(images, flip=True, crop_padding=2, cutout=3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert augment(images, generator=torch.Generator()) is images


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop_padding": 8}, "crop_padding 8"),
        ({"crop_padding": -1}, "crop_padding -1"),
        ({"cutout": -2}, "cutout -2"),
        ({"cutout": 2, "cutout_fill": (0.1, 0.2)}, "one for each of 3 channels"),
        ({"cutout": 2, "cutout_fill": 128.0}, r"in \[0, 1\]"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        augment(torch.zeros(2, 3, 8, 8), generator=torch.Generator(), **arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_cpu_generator_gives_the_same_on_the_gpu() -> None:
    images = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8)
    on_cpu = augment(images, flip=True, crop_padding=2, cutout=3, generator=torch.Generator().manual_seed(1))
    on_gpu = augment(
        images.cuda(), flip=True, crop_padding=2, cutout=3, generator=torch.Generator().manual_seed(1)
    )
    assert torch.equal(on_gpu.cpu(), on_cpu)
    own = torch.Generator("cuda").manual_seed(1)
    assert augment(images.cuda(), flip=True, crop_padding=2, cutout=3, generator=own).is_cuda
