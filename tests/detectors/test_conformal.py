"""The conformal decision: units, statistic, rank and level."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unpoison._statistics import Proportion
from unpoison.detectors._conformal import Baseline, p_value, responsible, standardised, statistic

EXAMPLES = 150
NONE = torch.zeros(0)


def draw(rows: int, seed: int) -> Tensor:
    """Collapses that share a centre and a heavy-tailed scale for each example, as real ones do."""
    randomness = torch.Generator().manual_seed(seed)
    scale = torch.randn(EXAMPLES, generator=randomness).exp()
    centre = torch.randn(EXAMPLES, generator=randomness)
    return (centre + torch.randn(rows, EXAMPLES, generator=randomness)) * scale


def test_robust_units_ignore_a_minority() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    units = standardised(values)
    assert abs(float(units.median())) < 1e-6
    assert float(units.std()) == pytest.approx(1, abs=0.1)
    values[:100] += 1000
    shift = (standardised(values) - units)[100:].abs()
    assert bool((shift <= 0.25 + 0.2 * units[100:].abs()).all())
    assert torch.equal(standardised(7 * values.double() - 3).sign(), standardised(values).sign())


@pytest.mark.parametrize("values", [[5.0] * 9, [0.0] * 8 + [1.0], [2.0]])
def test_equal_values_give_finite_units(values: list[float]) -> None:
    units = standardised(torch.tensor(values))
    assert bool(units.isfinite().all())
    assert units[:1].tolist() == [0.0]


def test_the_excess_is_the_distance_from_the_baseline_in_its_deviations() -> None:
    rows = draw(9, 1)
    found = Baseline.of(rows[1:]).excess(rows[0])
    units = torch.stack([standardised(row) for row in rows])
    spread = units[1:].std(0, correction=0)
    raw = (units[0] - units[1:].mean(0)) / (spread + spread.median())
    assert torch.allclose(found, standardised(raw))
    # Neither the unit of a row nor the order of the baseline matters.
    other = Baseline.of(rows[1:].flip(0) * 3).excess(rows[0] * 0.1)
    assert torch.allclose(other, found, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1])
def test_without_a_baseline_the_excess_is_in_the_label_s_own_units(count: int) -> None:
    rows = draw(2, 3)
    assert torch.allclose(Baseline.of(rows[:count]).excess(rows[1]), standardised(rows[1]))


def test_the_statistic_counts_unrelated_examples() -> None:
    excess = torch.full((40,), -1.0)
    excess[:10] = 3 + 1
    alone = torch.ones(40)
    assert float(statistic(excess, alone)) == pytest.approx(10)
    # Ten near-duplicates count less than one, whatever the others are.
    series = alone.clone()
    series[:10] = 10
    assert float(statistic(excess, series)) == pytest.approx(1 / 10)
    # An excess of 3 or less does not count, and a larger one by its root.
    excess[10:] = 3
    assert float(statistic(excess, alone)) == pytest.approx(10)
    excess[:10] = 3 + 9
    assert float(statistic(excess, alone)) == pytest.approx(30)
    assert statistic(excess.expand(3, 40), alone).shape == (3,)


def test_p_values_of_exchangeable_errors_are_uniform() -> None:
    values = []
    for seed in range(300):
        null = draw(20, seed)
        t = statistic(Baseline.of(draw(8, 1000 + seed)).excess(null), torch.ones(EXAMPLES))
        values.append(p_value(t[1:] >= t[0]))
    for level in (0.05, 0.1, 0.5):
        low, high = Proportion(sum(value <= level + 1e-9 for value in values), 300).interval(0.999)
        assert low <= level <= high, (level, low, high)
    assert min(values) >= 1 / 20
    assert max(values) <= 1


def test_a_planted_signal_has_the_smallest_p_value() -> None:
    for seed in range(5):
        rows = draw(28, seed)
        baseline = Baseline.of(rows[20:])
        rows[0, :60:10] += 12 * rows.std(0)[:60:10]
        t = statistic(baseline.excess(rows[:20]), torch.ones(EXAMPLES))
        assert p_value(t[1:] >= t[0]) == 1 / 20
        places, weights = responsible(baseline.excess(rows[:1]), 128)
        assert set(range(0, 60, 10)) <= set(places[0, :8].tolist())
        assert bool((weights[0].diff() <= 0).all())
        assert float(weights.min()) == 0


def test_an_excess_of_the_whole_label_is_none() -> None:
    rows = draw(9, 0)
    baseline = Baseline.of(rows[1:])
    assert torch.allclose(baseline.excess(rows[0] + 100), baseline.excess(rows[0]), atol=1e-3)


def test_without_errors_nothing_can_be_said() -> None:
    assert p_value(NONE >= 5.0) == 1.0
