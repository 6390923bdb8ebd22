"""What every set of allowed changes promises, by property."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from unpoison.errors import InputError
from unpoison.threats import ColorGrid, LInf, Perturbation, SumOfPerturbations

SMALL_GRID = ColorGrid(eps=0.05, resolution=4)
PERTURBATIONS = [LInf(8), LInf(0.5), LInf(2.7), SMALL_GRID, SMALL_GRID + LInf(3), LInf(3) + SMALL_GRID]
every = pytest.mark.parametrize("perturbation", PERTURBATIONS, ids=repr)


def draw(seed: int, *, extremes: bool = True) -> Tensor:
    """UInt8[5 3 6 7] images; half of the values black or white if `extremes`."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (5, 3, 6, 7), dtype=torch.uint8, generator=generator)
    if extremes:
        images[:, :, :2], images[:, :, 4:] = 0, 255
    return images


def wild(perturbation: Perturbation, images: Tensor, seed: int) -> dict[str, Tensor]:
    """Variables far outside the set."""
    generator = torch.Generator().manual_seed(seed)
    start = perturbation.initial(images, generator=generator)
    return {
        name: 3 * perturbation.scales()[name] * torch.randn(value.shape, generator=generator)
        for name, value in start.items()
    }


@every
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_rounded_images_stay_within_the_bound(perturbation: Perturbation, seed: int) -> None:
    images = draw(seed)
    variables = perturbation.project(wild(perturbation, images, seed + 1), images)
    rounded = perturbation.rounded(images, variables)
    assert rounded.dtype == torch.uint8
    change = (rounded.int() - images.int()).abs().max()
    assert change <= perturbation.bound() + 0.5
    exact = perturbation.apply(images, variables)
    assert 0 <= exact.min() <= exact.max() <= 1
    assert (exact * 255 - rounded).abs().max() <= 1


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), eps=st.floats(0.1, 40))
@example(seed=0, eps=0.99999)
def test_linf_holds_eps_exactly_on_the_8_bit_grid(seed: int, eps: float) -> None:
    images = draw(seed)
    perturbation = LInf(eps)
    delta = wild(perturbation, images, seed)  # not projected: rounding alone must hold the bound
    assert (perturbation.rounded(images, delta).int() - images.int()).abs().max() <= eps
    recoloured = (SMALL_GRID + perturbation).rounded(images, _under_sum(images, delta))
    assert torch.equal(recoloured, perturbation.rounded(images, delta))


def _under_sum(images: Tensor, delta: dict[str, Tensor]) -> dict[str, Tensor]:
    zero = SMALL_GRID.initial(images, generator=torch.Generator())
    return {"0.grid": zero["grid"], "1.delta": delta["delta"]}


@every
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_projection_is_inside_and_stays_where_it_is(perturbation: Perturbation, seed: int) -> None:
    images = draw(seed)
    once = perturbation.project(wild(perturbation, images, seed), images)
    twice = perturbation.project(once, images)
    scales = perturbation.scales()
    assert once.keys() == twice.keys() == scales.keys()
    for name, value in once.items():
        assert torch.allclose(value, twice[name], atol=1e-4)
        assert value.abs().max() <= scales[name]
        assert not value.requires_grad


@every
def test_it_starts_inside_and_draws_from_the_generator_alone(perturbation: Perturbation) -> None:
    images = draw(0)
    state = torch.random.get_rng_state()
    first, again, other = (
        perturbation.initial(images, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, value in first.items():
        assert len(value) == len(images)
        assert torch.equal(value, again[name])
        assert torch.allclose(perturbation.project(first, images)[name], value, atol=1e-4)
        assert name.endswith("grid") or not torch.equal(value, other[name])


@every
def test_its_derivative_is_that_of_finite_differences(perturbation: Perturbation) -> None:
    images = draw(3, extremes=False).clamp(60, 190)  # nothing is clipped
    start = perturbation.initial(images, generator=torch.Generator().manual_seed(0))
    variables = {name: 0.3 * value.double() for name, value in start.items()}
    direction = {name: torch.randn_like(value) for name, value in variables.items()}
    weight = torch.randn(images.shape, dtype=torch.float64)

    def value(step: float) -> float:
        moved = {name: tensor + step * direction[name] for name, tensor in variables.items()}
        return float((perturbation.apply(images, moved) * weight).sum())

    leaves = {name: tensor.clone().requires_grad_() for name, tensor in variables.items()}
    (perturbation.apply(images, leaves) * weight).sum().backward()  # type: ignore[no-untyped-call]
    slope = sum(
        float((leaf.grad * direction[name]).sum()) for name, leaf in leaves.items() if leaf.grad is not None
    )
    # Only the sum grid-after-addition is not linear: there the place in colour space moves too.
    assert slope == pytest.approx((value(1e-6) - value(-1e-6)) / 2e-6, rel=1e-4)


@every
def test_a_stored_perturbation_comes_back(perturbation: Perturbation) -> None:
    assert Perturbation.from_json(perturbation.to_json(), perturbation.tensors()) == perturbation


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_grid_of_zeros_changes_nothing(seed: int) -> None:
    images = draw(seed)
    grid = ColorGrid()
    variables = grid.initial(images, generator=torch.Generator())
    assert torch.equal(grid.rounded(images, variables), images)
    assert not grid.penalty(variables).any()


def test_a_grid_shifts_every_colour_alike_when_its_offsets_are_equal() -> None:
    images = draw(0, extremes=False).clamp(60, 190)
    grid = ColorGrid(eps=0.04, resolution=5)
    variables = grid.initial(images, generator=torch.Generator())
    variables["grid"][..., 0] = 0.04  # brighter: Y alone goes to red, green and blue in equal parts
    assert torch.allclose(grid.apply(images, variables) * 255 - images, torch.tensor(10.2), atol=1e-3)
    assert not grid.penalty(variables).any()


def test_equal_colours_stay_equal() -> None:
    images = torch.full((1, 3, 4, 4), 100, dtype=torch.uint8)
    variables = wild(SMALL_GRID, images, 0)
    recoloured = SMALL_GRID.rounded(images, SMALL_GRID.project(variables, images))
    assert (recoloured == recoloured[:, :, :1, :1]).all()


def test_the_penalty_is_the_mean_squared_step_between_neighbours() -> None:
    grid = ColorGrid(eps=0.5, resolution=2, smoothness=3)
    variables = grid.initial(torch.zeros(2, 3, 1, 1, dtype=torch.uint8), generator=torch.Generator())
    variables["grid"][1, 1] = 0.5  # a step of 1/2 along the first of three axes, everywhere
    assert grid.penalty(variables).tolist() == pytest.approx([0, 3 * (0.5 * 2) ** 2 / 3])


def test_sums_are_flat_and_keep_their_order() -> None:
    total = LInf(1) + (SMALL_GRID + LInf(2))
    assert isinstance(total, SumOfPerturbations)
    assert total.terms == (LInf(1), SMALL_GRID, LInf(2))
    assert total.bound() == 3 + SMALL_GRID.bound()


def test_grey_images_have_no_colours_to_move() -> None:
    with pytest.raises(InputError, match="needs images of 3 channels, these have 1; use LInf"):
        SMALL_GRID.initial(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), generator=torch.Generator())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LInf(0), "LInf: eps 0 is outside"),
        (lambda: LInf(256), "LInf: eps 256 is outside"),
        (lambda: ColorGrid(eps=0), "ColorGrid: eps 0 is outside"),
        (lambda: ColorGrid(resolution=1), "ColorGrid: resolution 1 is below 2"),
        (lambda: ColorGrid(smoothness=-1), "ColorGrid: smoothness -1 is below 0"),
        (lambda: SumOfPerturbations(()), "needs at least one term"),
    ],
)
def test_numbers_out_of_range_are_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(InputError, match=message):
        make()
