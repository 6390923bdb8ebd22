"""Seed expansion: cosines in the metric of the curvature, and the threshold."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from unpoison.data import TrainingSet
from unpoison.detectors import Calibrated
from unpoison.detectors._search import Search
from unpoison.detectors._seed_expansion import (
    SplitScores,
    _centred,
    _products,
    expand_seeds,
    minimum_error_threshold,
    valley,
)
from unpoison.influence import Factors, RelativeDamping, fit_factors
from unpoison.tasks import ClassificationTask


def normal(count: int, mean: float, deviation: float, seed: int) -> Tensor:
    return mean + deviation * torch.randn(count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("many", "few", "distance"), [(500, 30, 0.6), (100, 100, 0.5), (900, 8, 0.8)])
def test_the_threshold_lies_between_two_groups(many: int, few: int, distance: float) -> None:
    for seed in range(5):
        low, high = normal(many, 0.0, 0.05, seed), normal(few, distance, 0.05, 99 + seed)
        for cut in (minimum_error_threshold, valley):
            threshold = cut(torch.cat([high, low]))
            assert float(low.max()) < threshold < float(high.min()), cut


def slow_minimum_error(values: list[float]) -> float:
    ordered = sorted(values)
    least = 1e-3 * (ordered[-1] - ordered[0]) ** 2

    def variance(group: list[float]) -> float:
        mean = sum(group) / len(group)
        return max(sum((value - mean) ** 2 for value in group) / len(group), least)

    costs = {}
    for count in range(2, len(ordered) - 1):
        groups, cost = (ordered[:count], ordered[count:]), 0.0
        for group in groups:
            share = len(group) / len(ordered)
            cost += share * math.log(variance(group)) - 2 * share * math.log(share)
        costs[count] = cost
    best = min(costs, key=lambda count: costs[count])
    return (ordered[best - 1] + ordered[best]) / 2


@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_is_that_of_kittler_and_illingworth(seed: int) -> None:
    values = torch.cat([normal(40, 0.1, 0.1, seed), normal(9, 0.7, 0.1, seed + 50)]).double()
    assert minimum_error_threshold(values) == pytest.approx(slow_minimum_error(values.tolist()))


def test_the_poison_that_least_resembles_the_rest_is_above_the_threshold() -> None:
    clean = normal(500, 0.0, 0.004, 1)
    stragglers = torch.tensor([0.11, 0.15, 0.19])
    poison = normal(30, 0.6, 0.05, 2)
    values = torch.cat([clean, stragglers, poison])
    assert minimum_error_threshold(values) > 0.19 or valley(values) <= 0.11
    assert float(clean.max()) < valley(values) < 0.6


@pytest.mark.parametrize("cut", [minimum_error_threshold, valley])
@pytest.mark.parametrize(
    "values", [[], [0.5], [0.1, 0.9], [0.3] * 3, [0.3] * 9, [0.0] * 20, [-0.5, -0.4, -0.1, -0.2, -0.3]]
)
def test_few_or_equal_values_give_a_number(cut: object, values: list[float]) -> None:
    assert math.isfinite(cut(torch.tensor(values)))  # type: ignore[operator]


CLASSES = 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(16, 6), nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(functional.relu(self.first(images.flatten(1))))


PLANTED = list(range(0, 60, 6))


@pytest.fixture(scope="module")
def twins() -> tuple[nn.Module, TrainingSet, Factors]:
    """Sixty drawn images of which every sixth is the same, with the same label."""
    randomness = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (60, 1, 4, 4), dtype=torch.uint8, generator=randomness)
    labels = torch.randint(0, CLASSES, (60,), generator=randomness)
    images[PLANTED], labels[PLANTED] = images[0].clone(), 1
    training_set = TrainingSet(images, labels, ("a", "b", "c"))
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = Net().eval()
    return model, training_set, fit_factors(model, training_set, ClassificationTask(), seed=0)


def search_of(model: nn.Module, training_set: TrainingSet, factors: Factors) -> Search:
    detector = Calibrated(damping=RelativeDamping(0.1), batch_size=16)
    return Search(detector, model, training_set, None, None, 0, None, factors)


def expand(
    twins: tuple[nn.Module, TrainingSet, Factors], seeds: list[int]
) -> tuple[Tensor, float, list[int]]:
    """Scores of the examples labelled 1, the threshold, and which of all examples these are."""
    model, training_set, factors = twins
    rows = (training_set.labels == 1).nonzero()[:, 0]
    places = torch.searchsorted(rows, torch.tensor(seeds))
    found = expand_seeds(search_of(model, training_set, factors), places, training_set.subset(rows))
    return found.scores, found.threshold, rows.tolist()


def test_duplicates_are_members(twins: tuple[nn.Module, TrainingSet, Factors]) -> None:
    scores, threshold, rows = expand(twins, PLANTED[:4])
    members = (scores > threshold).nonzero()[:, 0].tolist()
    assert [rows[place] for place in members] == PLANTED
    assert len(rows) > len(PLANTED)
    assert scores[members].tolist() == pytest.approx([1.0] * len(PLANTED), abs=1e-4)
    assert float(scores.abs().max()) <= 1 + 1e-4


def test_a_clean_seed_carries_little_weight(twins: tuple[nn.Module, TrainingSet, Factors]) -> None:
    clean = next(row for row in (twins[1].labels == 1).nonzero()[:, 0].tolist() if row not in PLANTED)
    scores, threshold, rows = expand(twins, [*PLANTED[:5], clean])
    planted = torch.tensor([row in PLANTED for row in rows])
    assert float(scores[planted].min()) > 0.9
    assert float(scores[planted].min()) > float(scores[~planted].max())
    assert bool((scores[planted] > threshold).all())


def test_cosines_are_those_of_the_explicit_metric(twins: tuple[nn.Module, TrainingSet, Factors]) -> None:
    model, training_set, factors = twins
    inputs, labels = training_set.batch(0, len(training_set))
    flat = []
    for name in ("first", "head"):
        layer, own = model.get_submodule(name), factors.layers[name]
        assert own.input_basis is not None
        assert own.output_basis is not None
        eigenvalues = own.eigenvalues[0].double()
        damped = eigenvalues + 0.1 * eigenvalues.mean()
        rows = []
        for index in range(len(training_set)):
            loss = functional.cross_entropy(model(inputs[index : index + 1]), labels[index : index + 1])
            weight, bias = torch.autograd.grad(loss, [layer.weight, layer.bias])  # type: ignore[list-item]
            gradient = torch.cat([weight, bias[:, None]], 1).double()
            turned = own.output_basis[0].double().t() @ gradient @ own.input_basis[0].double()
            rows.append((turned / damped.sqrt()).flatten())
        flat.append(torch.stack(rows))
    unit = functional.normalize(torch.cat(flat, 1))
    unit = functional.normalize(unit - unit.mean(0))
    scores = expand_seeds(search_of(model, training_set, factors), torch.tensor([7]), training_set).scores
    expected = unit @ unit[7]
    # The cosine of the seed with itself does not count.
    expected[7] = 0
    assert torch.allclose(scores, expected, atol=1e-4)


def test_what_all_examples_have_in_common_does_not_count() -> None:
    """Rows that share one direction: without the mean all would resemble each other."""
    randomness = torch.Generator().manual_seed(3)
    rows = torch.randn(300, 40, generator=randomness).double() + 3 * torch.eye(40)[0].double()
    rows[:20] += 2 * torch.eye(40)[1].double()
    unit = functional.normalize(rows)
    seeds, drawn = torch.arange(8), torch.arange(300)
    cosines = _centred(unit[seeds] @ unit.t(), unit @ unit.mean(0), seeds, drawn)
    centred = functional.normalize(unit - unit.mean(0))
    assert torch.allclose(cosines, centred[seeds] @ centred.t())
    assert float(cosines[:, 20:].mean().abs()) < 0.1
    assert float((unit[seeds] @ unit[20:].t()).mean()) > 0.15


def test_the_mean_is_of_examples_drawn_from_many(twins: tuple[nn.Module, TrainingSet, Factors]) -> None:
    model, training_set, factors = twins
    many = training_set.subset([row % 60 for row in range(400)])
    seeds, search = torch.tensor([0, 6, 12]), search_of(model, training_set, factors)
    products, mean = _products(search, many, seeds, torch.arange(0, 400, 7))
    whole, _ = _products(search, many, torch.arange(0, 400, 7), torch.tensor([0]))
    assert torch.allclose(mean, whole.mean(0), atol=1e-5)
    assert products.diagonal()[0] == pytest.approx(1, abs=1e-5)
    again = [expand_seeds(search, seeds, many).scores for _ in range(2)]
    assert torch.equal(*again)


def test_one_seed_finds_its_duplicates(twins: tuple[nn.Module, TrainingSet, Factors]) -> None:
    scores, threshold, rows = expand(twins, [PLANTED[2]])
    members = (scores > threshold).nonzero()[:, 0].tolist()
    assert {rows[place] for place in members} == set(PLANTED) - {PLANTED[2]}


def test_an_example_without_gradient_gives_zero_not_nan() -> None:
    randomness = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (20, 1, 4, 4), dtype=torch.uint8, generator=randomness)
    images[3] = 0
    labels = torch.arange(20) % 2
    training_set = TrainingSet(images, labels, ("a", "b"))
    with torch.random.fork_rng():
        torch.manual_seed(4)
        # Without bias a black image has no gradient.
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2, bias=False)).eval()
    factors = fit_factors(model, training_set, ClassificationTask(), seed=0)
    for seeds in ([3], [3, 5], [1, 5]):
        found = expand_seeds(search_of(model, training_set, factors), torch.tensor(seeds), training_set)
        assert bool(torch.isfinite(found.scores).all())
        assert float(found.scores[3]) == 0
        assert math.isfinite(found.threshold)


def test_separation_of_members_from_other_examples() -> None:
    others = torch.linspace(-1, 1, 101)
    members = torch.linspace(3, 5, 11)
    scores = torch.cat([others, members]).double()
    found = SplitScores(scores, 2.0)
    assert found.members.nonzero()[:, 0].tolist() == list(range(101, 112))
    # A tenth of eleven from 3 to 5 lies below 3.2; of the others a hundredth above 0.98.
    assert found.separation == pytest.approx(3.2 / 0.98)
    assert found.separated
    # Where most examples are members, they are no group of their own.
    assert SplitScores(scores, -0.97).separation > 3
    assert not SplitScores(scores, -0.97).separated
    assert not SplitScores(scores, 9.0).separated
    assert SplitScores(scores, 9.0).separation == -math.inf
    assert SplitScores(scores, -2.0).separation == math.inf
