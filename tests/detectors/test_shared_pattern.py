"""The pattern that inputs share: its discriminant, near-duplicates, who carries it, where there is none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.covariance import OAS
from torch import Tensor

from unpoison.data import TensorExamples, TrainingSet
from unpoison.detectors import _shared_pattern as stage
from unpoison.detectors._near_duplicates import NearDuplicates
from unpoison.detectors._seed_expansion import SplitScores
from unpoison.detectors._shared_pattern import (
    Discriminant,
    InverseCovariance,
    LabelInputs,
    Pattern,
    Patterns,
    inputs_at,
    pattern_bytes,
    reduced,
    shared_pattern,
)

CARRIERS = torch.arange(0, 40)
"""Which of the 200 examples have the pattern."""


def pictures(count: int, seed: int, side: int = 8) -> Tensor:
    """Float32[n 3 side side] in [0, 1]: smooth, so that neighbouring pixels are alike."""
    noise = torch.rand(count, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    fine = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed + 1))
    return 0.8 * torch.nn.functional.interpolate(noise, side, mode="bilinear") + 0.2 * fine


def with_pattern(images: Tensor, strength: float = 0.35) -> Tensor:
    images = images.clone()
    images[CARRIERS, :, -2:, -2:] += strength
    return images


def alone(of: Tensor, to: Tensor) -> Tensor:
    return (of[:, None] == to).double()


def marked(members: Tensor, count: int = 200) -> Tensor:
    mask = torch.zeros(count, dtype=torch.bool)
    mask[members] = True
    return mask


def pattern_of(
    inputs: Tensor, noise: Tensor, members: Tensor, likeness: Callable[[Tensor, Tensor], Tensor] = alone
) -> SplitScores | None:
    found = Discriminant(inputs, noise, likeness).pattern(members)
    return None if found is None else found.split


def inverse_of(inputs: Tensor) -> Tensor:
    """Float64[d d]: the inverse of the covariance that scikit-learn shrinks."""
    return torch.from_numpy(np.linalg.inv(OAS().fit(inputs.double().numpy()).covariance_))


@pytest.mark.parametrize("count", [30, 400])
def test_the_inverse_covariance_is_that_of_the_inputs(count: int) -> None:
    inputs = pictures(count, 0).flatten(1)
    explicit = inverse_of(inputs)
    vectors = torch.randn(4, inputs.shape[1], generator=torch.Generator().manual_seed(1))
    found = InverseCovariance(inputs - inputs.mean(0))(vectors)
    expected = vectors.double() @ explicit
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


def test_scores_are_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "_ROUNDS", 1)
    monkeypatch.setattr(stage, "_FEWEST_MEMBERS", 1)
    inputs, noise = with_pattern(pictures(60, 3)).flatten(1)[:, ::4], pictures(90, 5).flatten(1)[:, ::4]
    members = marked(torch.tensor([0, 1, 2, 3, 4, 5, 50]), 60)
    random = torch.rand(60, 60, generator=torch.Generator().manual_seed(2)).double()
    likeness = 0.5 * (random + random.t()).fill_diagonal_(0.3)  # the diagonal counts as 1
    found = pattern_of(inputs, noise, members, lambda of, to: likeness[of][:, to])
    assert found is not None
    centre, inverse = inputs[~members].double().mean(0), inverse_of(noise)
    places = members.nonzero()[:, 0].tolist()

    def alike(j: int, k: int) -> float:
        return 1.0 if j == k else float(likeness[j, k])

    for j in range(60):
        above = below = 0.0
        for k in places:
            weight = (1 - alike(j, k)) / sum(alike(other, k) for other in places)
            product = (inputs[j].double() - centre) @ inverse @ (inputs[k].double() - centre)
            above, below = above + weight * float(product), below + weight
        assert float(found.scores[j]) == pytest.approx(above / below, rel=1e-3, abs=1e-2)


@pytest.mark.parametrize(("right", "wrong"), [(40, 0), (20, 10), (15, 30), (12, 0)])
def test_members_become_those_with_the_pattern(right: int, wrong: int) -> None:
    for seed in range(3):
        inputs = with_pattern(pictures(200, 10 * seed)).flatten(1)
        members = marked(torch.cat([torch.arange(right), torch.arange(100, 100 + wrong)]))
        found = pattern_of(inputs, pictures(300, 10 * seed + 5).flatten(1), members)
        assert found is not None
        assert torch.equal(found.members, marked(CARRIERS))
        assert found.separated


def test_a_series_of_near_duplicates_counts_once() -> None:
    inputs = with_pattern(pictures(200, 1)).flatten(1)
    inputs[150:180] = inputs[150] + 0.02 * torch.randn(30, inputs.shape[1], generator=torch.Generator())
    series = torch.zeros(200, dtype=torch.int64)
    series[:] = torch.arange(200)
    series[150:180] = 150
    members, noise = (
        marked(torch.cat([torch.arange(20), torch.arange(150, 165)])),
        pictures(300, 8).flatten(1),
    )
    found = pattern_of(inputs, noise, members, lambda of, to: (series[of, None] == series[to]).double())
    unaware = pattern_of(inputs, noise, members)
    assert found is not None
    assert unaware is not None
    assert torch.equal(found.members, marked(CARRIERS))
    assert bool(unaware.members[150:180].all())


@pytest.mark.parametrize(("apart", "found"), [(1, False), (4, False), (5, True), (40, True)])
def test_so_many_series_of_near_duplicates_are_so_many_members(apart: int, found: bool) -> None:
    inputs, noise = with_pattern(pictures(200, 0)).flatten(1), pictures(300, 5).flatten(1)
    series = torch.arange(200)
    series[CARRIERS] %= apart
    likeness = Discriminant(inputs, noise, lambda of, to: (series[of, None] == series[to]).double())
    assert (likeness.pattern(marked(CARRIERS)) is not None) is found


class Asked:
    def __init__(self, training_set: Any) -> None:
        self.training_set, self.seed = training_set, 0


def expansion_to(members: Tensor, count: int) -> SplitScores:
    """With members that lie next to the others."""
    places = torch.linspace(0.01, 1.0, count).double()
    return SplitScores(torch.where(marked(members, count), 0.5 + 0.1 * places, 0.5 * places), 0.5)


def case(images: Tensor) -> tuple[TrainingSet, Tensor]:
    """A set with 200 examples labelled 1, of which 40 have the pattern, and 300 others; their rows."""
    whole = torch.cat([pictures(150, 30, images.shape[-1]), images, pictures(150, 40, images.shape[-1])])
    labels = torch.cat([torch.zeros(150), torch.ones(200), torch.zeros(150)]).long()
    return TrainingSet((whole.clamp(0, 1) * 255).round().byte(), labels, ("a", "b")), torch.arange(150, 350)


def found_in(training_set: Any, rows: Tensor, members: Tensor, seeds: Tensor) -> SplitScores | None:
    expansion = expansion_to(members, len(rows))
    return shared_pattern(inputs_of(training_set, rows, expansion.scores), expansion, seeds)


def inputs_of(training_set: Any, rows: Tensor, scores: Tensor) -> LabelInputs | None:
    return LabelInputs.of(Asked(training_set), rows, NearDuplicates.of(training_set), scores)  # type: ignore[arg-type]


def test_a_pattern_is_found_in_a_training_set() -> None:
    training_set, rows = case(with_pattern(pictures(200, 20)))
    members = torch.cat([torch.arange(20), torch.arange(100, 110)])
    found = found_in(training_set, rows, members, torch.arange(10))
    assert found is not None
    assert torch.equal(found.members, marked(CARRIERS))
    examples = TensorExamples(training_set.at(torch.arange(500))[0], training_set.labels)
    again = found_in(examples, rows, members, torch.arange(10))
    assert again is not None
    assert torch.equal(again.members, found.members)


def test_vectors_of_numbers_are_searched_as_well() -> None:
    training_set, rows = case(with_pattern(pictures(200, 20)))
    examples = TensorExamples(training_set.at(torch.arange(500))[0].flatten(1), training_set.labels)
    found = found_in(examples, rows, torch.arange(20), torch.arange(10))
    assert found is not None
    assert int((found.members ^ marked(CARRIERS)).sum()) <= 1  # a white corner cannot become whiter


def test_of_many_examples_those_that_resemble_the_seeds_count(monkeypatch: pytest.MonkeyPatch) -> None:
    training_set, rows = case(with_pattern(pictures(200, 20)))
    monkeypatch.setattr(stage, "_MOST_EXAMPLES", 150)
    scores = expansion_to(torch.arange(20), 200).scores
    scores[120:170] = -1.0
    expansion = SplitScores(scores, 0.5)
    found = shared_pattern(inputs_of(training_set, rows, scores), expansion, torch.arange(10))
    assert found is not None
    assert torch.equal(found.members, marked(CARRIERS))
    assert float(found.scores[120:170].max()) < float(found.scores[:120].min())


NOTHING: dict[str, Callable[[], tuple[Any, Tensor, Tensor]]] = {
    "there is none": lambda: (*case(pictures(200, 20)), torch.arange(40)),
    "four members": lambda: (*case(with_pattern(pictures(200, 20))), torch.arange(4)),
    "all are members": lambda: (*case(with_pattern(pictures(200, 20))), torch.arange(200)),
    "no members": lambda: (*case(with_pattern(pictures(200, 20))), torch.arange(0)),
    "equal images": lambda: (*case(torch.full((200, 3, 8, 8), 0.5)), torch.arange(40)),
}


@pytest.mark.parametrize("name", NOTHING)
def test_no_pattern(name: str) -> None:
    training_set, rows, members = NOTHING[name]()
    assert found_in(training_set, rows, members, members) is None


def test_no_pattern_where_all_images_are_equal() -> None:
    training_set = TrainingSet(
        torch.full((500, 3, 8, 8), 7, dtype=torch.uint8), torch.zeros(500).long(), ("a", "b")
    )
    assert found_in(training_set, torch.arange(500), torch.arange(40), torch.arange(10)) is None


def test_a_pattern_that_the_seeds_do_not_have_does_not_count() -> None:
    training_set, rows = case(with_pattern(pictures(200, 20)))
    members = torch.cat([torch.arange(20), torch.arange(100, 110)])
    assert found_in(training_set, rows, members, torch.arange(5)) is not None
    assert found_in(training_set, rows, members, torch.arange(100, 110)) is None


def test_a_pattern_that_separates_less_than_the_cosines_does_not_count() -> None:
    training_set, rows = case(with_pattern(pictures(200, 20)))
    members = torch.arange(30)
    assert found_in(training_set, rows, members, torch.arange(10)) is not None
    known = inputs_of(training_set, rows, torch.zeros(200))
    assert known is not None
    apart = SplitScores(marked(members).double(), 0.5)
    assert apart.separation > 1e6
    assert shared_pattern(known, apart, torch.arange(10)) is None


def test_inputs_that_are_no_numbers_have_none() -> None:
    tokens = TensorExamples(torch.randint(0, 50, (80, 12)), torch.zeros(80).long())
    assert found_in(tokens, torch.arange(80), torch.arange(40), torch.arange(10)) is None


@pytest.mark.parametrize("scale", [1e-25, 1e20])
def test_the_scale_of_inputs_does_not_matter(scale: float) -> None:
    inputs, noise = with_pattern(pictures(200, 0)).flatten(1), pictures(300, 5).flatten(1)
    members = marked(torch.arange(20))
    found, scaled = (pattern_of(inputs * size, noise * size, members) for size in (1.0, scale))
    assert found is not None
    assert scaled is not None
    torch.testing.assert_close(scaled.scores, found.scores, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("place", [0, 1])
def test_inputs_that_are_not_finite_have_none(place: int) -> None:
    sets = [with_pattern(pictures(200, 0)).flatten(1), pictures(300, 5).flatten(1)]
    sets[place][7, 3] = math.nan
    assert pattern_of(sets[0], sets[1], marked(torch.arange(20))) is None


def test_the_memory_is_that_of_reduced_inputs() -> None:
    count = 2 * (8 * (200 + 500) * 3 * 8 * 8 + 8 * 500**2)
    training_set, _ = case(pictures(200, 20))
    assert pattern_bytes(training_set, 200) == count
    vectors = TensorExamples(torch.zeros(500, 192), training_set.labels)
    assert pattern_bytes(vectors, 200) == count
    large, _ = case(pictures(200, 20, 64))
    assert pattern_bytes(large, 200) == 2 * (8 * (200 + 500) * 3 * 32 * 32 + 8 * 500**2)
    assert pattern_bytes(TensorExamples(torch.zeros(80, 12).long(), torch.zeros(80).long()), 80) == 0


def test_large_images_are_reduced() -> None:
    training_set, rows = case(with_pattern(pictures(200, 20, 64), 0.4))
    inputs = inputs_at(training_set, rows[:7])
    assert inputs.shape == (7, 3 * 32 * 32)
    expected = training_set.at(rows[:7])[0].unflatten(2, (32, 2)).unflatten(4, (32, 2)).mean((3, 5))
    torch.testing.assert_close(inputs, expected.flatten(1))
    found = found_in(training_set, rows, torch.arange(25), torch.arange(10))
    assert found is not None
    assert int((found.members ^ marked(CARRIERS)).sum()) <= 1  # a white corner cannot become whiter


def carried(
    training_set: TrainingSet, rows: Tensor, inputs: Tensor, places: Tensor, weights: Tensor | None = None
) -> bool:
    patterns = Patterns(Asked(training_set), NearDuplicates.of(training_set))  # type: ignore[arg-type]
    if weights is None:
        weights = torch.linspace(5.0, 1.0, len(places)).double()
    return patterns.carried(1, reduced(inputs), rows[places], weights)


FIRST = torch.cat([torch.arange(12), torch.arange(100, 106)])
"""What stands out: 12 examples with the pattern, then 6 without."""


def test_an_input_carries_the_pattern_or_not() -> None:
    training_set, rows = case(with_pattern(pictures(200, 20)))
    new = pictures(200, 70)
    with_it = with_pattern(new)[CARRIERS].clamp(0, 1)
    assert all(carried(training_set, rows, with_it[one : one + 1], FIRST) for one in range(8))
    assert not any(carried(training_set, rows, new[one : one + 1], FIRST) for one in range(8))
    assert carried(training_set, rows, with_it[:4], FIRST)
    assert not carried(training_set, rows, new[:4], FIRST)


def test_what_stands_out_must_share_the_pattern() -> None:
    training_set, rows = case(with_pattern(pictures(200, 20)))
    asked = with_pattern(pictures(200, 70))[:1].clamp(0, 1)
    # It finds the pattern from a third of its carriers, but the foremost five are others.
    assert not carried(training_set, rows, asked, FIRST.flip(0), torch.linspace(2.0, 1.0, 18).double())
    assert carried(training_set, rows, asked, FIRST, torch.linspace(2.0, 1.0, 18).double())
    assert not carried(training_set, rows, asked, torch.arange(4))
    assert not carried(training_set, rows, asked, FIRST, torch.zeros(18).double())
    clean, _ = case(pictures(200, 20))
    assert not carried(clean, rows, asked, FIRST)
    assert not carried(training_set, rows, torch.zeros(1, 12).long(), FIRST)


def test_an_input_is_scored_as_an_example_is() -> None:
    """With no near-duplicates the score of an example that is no member is that of its input."""
    inputs, noise = with_pattern(pictures(200, 0)).flatten(1), pictures(300, 5).flatten(1)
    found = Discriminant(inputs, noise, alone).pattern(marked(torch.arange(20)))
    assert isinstance(found, Pattern)
    others = (~found.split.members).nonzero()[:, 0]
    scores = (inputs[others] / found.scale - found.centre) @ found.direction
    torch.testing.assert_close(scores.double(), found.split.scores[others], rtol=1e-3, atol=1e-3)
    assert [found.carried_by(inputs[[one]]) for one in (3, 39, 60)] == [True, True, False]


def test_labels_are_kept_as_long_as_they_are_needed() -> None:
    training_set, rows = case(with_pattern(pictures(200, 20)))
    patterns = Patterns(Asked(training_set), NearDuplicates.of(training_set))  # type: ignore[arg-type]
    first = patterns.label(1, rows, torch.zeros(200))
    other = torch.cat([torch.arange(150), torch.arange(350, 500)])
    for label in (0, 2, 3):
        assert patterns.label(label, other, torch.zeros(300)) is not first
    assert patterns.label(1, rows, torch.zeros(200)) is first
    assert len(patterns._known) == 2
