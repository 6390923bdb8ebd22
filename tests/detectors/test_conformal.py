"""The conformal decision: its level, its power, its seeds, its corner cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from unpoison._statistics import Proportion
from unpoison.detectors._conformal import compare, decide

INPUTS, EXAMPLES = 19, 150


def draw(rows: int, seed: int) -> Tensor:
    """Collapses that share a heavy-tailed scale for each example, as real ones do."""
    randomness = torch.Generator().manual_seed(seed)
    scale = torch.randn(EXAMPLES, generator=randomness).exp()
    centre = torch.randn(EXAMPLES, generator=randomness)
    return (centre + torch.randn(rows, EXAMPLES, generator=randomness)) * scale


def test_exchangeable_queries_have_uniform_p_values() -> None:
    values = []
    for seed in range(200):
        rows = draw(INPUTS + 1, seed)
        values.append(compare(rows[0], rows[1:], false_discoveries=0.05).p_value)
    # Of 20 equally likely ranks the first 1, 2 and 10; once in 1000 a binomial leaves the interval.
    for level in (0.05, 0.1, 0.5):
        low, high = Proportion(sum(value <= level + 1e-9 for value in values), 200).interval(0.999)
        assert low <= level <= high, (level, low, high)
    assert min(values) >= 1 / (INPUTS + 1)
    assert max(values) <= 1


def test_a_planted_signal_is_found_and_flagged() -> None:
    planted = torch.arange(0, 60, 10)
    for seed in range(5):
        rows = draw(INPUTS + 1, seed)
        rows[0, planted] += 12 * rows[1:].std(0)[planted]
        found = compare(rows[0], rows[1:], false_discoveries=0.05)
        assert found.p_value == pytest.approx(1 / (INPUTS + 1))
        flagged = (found.excess > found.threshold).nonzero()[:, 0].tolist()
        assert set(flagged) >= set(planted.tolist())
        assert len(flagged) <= 9
        # Neither the unit nor the order matters.
        scaled = compare(rows[0] * 7, rows[1:].flip(0) * 7, false_discoveries=0.05)
        assert scaled.p_value == found.p_value
        assert torch.allclose(scaled.excess, found.excess)


def test_the_excess_is_the_distance_from_the_calibration_mean_in_deviations() -> None:
    rows = draw(INPUTS + 1, 1).double()
    found = compare(rows[0], rows[1:], false_discoveries=0.05)
    deviations = torch.stack([rows[1:, j].std() for j in range(EXAMPLES)])
    for j in range(EXAMPLES):
        expected = (rows[0, j] - rows[1:, j].mean()) / (deviations[j] + deviations.median())
        assert float(found.excess[j]) == pytest.approx(float(expected))


def test_the_p_value_is_the_rank_of_the_statistic_with_each_calibration_input_left_out() -> None:
    rows = draw(INPUTS + 1, 4).double()
    fudge = rows[1:].std(0).median()
    excesses = [(rows[0] - rows[1:].mean(0)) / (rows[1:].std(0) + fudge)]
    for place in range(1, INPUTS + 1):
        rest = torch.cat([rows[1:place], rows[place + 1 :]])
        excesses.append((rows[place] - rest.mean(0)) / (rest.std(0) + fudge))
    tops = torch.stack([excess.sort(descending=True).values[[2, 5, 14]] for excess in excesses])
    heights = (tops - tops[1:].mean(0)) / (tops[1:].std(0) + 0.05)
    drops = [heights[:, 0] - heights[:, 1], heights[:, 0] - heights[:, 2], heights[:, 1] - heights[:, 2]]
    statistics = torch.stack(drops).amax(0)
    found = compare(rows[0], rows[1:], false_discoveries=0.05)
    assert found.statistic == pytest.approx(float(statistics[0]))
    assert found.p_value == (1 + int((statistics[1:] >= statistics[0]).sum())) / (INPUTS + 1)


def test_with_likely_examples_the_p_value_is_twice_the_smaller_of_two() -> None:
    likely = torch.arange(EXAMPLES) % 3 == 0
    planted = likely.nonzero()[:8, 0]
    for seed in range(5):
        rows = draw(INPUTS + 1, seed)
        alone = compare(rows[0], rows[1:], false_discoveries=0.05, likely=likely).p_value
        every = compare(rows[0], rows[1:], false_discoveries=0.05).p_value
        assert alone <= min(1, 2 * every) + 1e-9
        unit = rows[1:].std(0)
        rows[0, planted] += 5 * unit[planted]
        # Three calibration inputs with much larger collapses, of examples that are not likely.
        for odd in (1, 2, 3):
            others = (~likely).nonzero()[10 * odd : 10 * odd + 8, 0]
            rows[odd, others] += 40 * unit[others]
        assert compare(rows[0], rows[1:], false_discoveries=0.05).p_value > 3 / (INPUTS + 1)
        found = compare(rows[0], rows[1:], false_discoveries=0.05, likely=likely)
        assert found.p_value == pytest.approx(2 / (INPUTS + 1))
        # Poison without the label is found by the other of the two.
        rows = draw(INPUTS + 1, seed)
        rows[0, others] += 12 * unit[others]
        found = compare(rows[0], rows[1:], false_discoveries=0.05, likely=likely)
        assert found.p_value == pytest.approx(2 / (INPUTS + 1))


def test_the_p_value_is_valid_for_exchangeable_queries_with_likely_examples() -> None:
    likely = torch.arange(EXAMPLES) % 4 == 0
    values = []
    for seed in range(200):
        rows = draw(INPUTS + 1, seed)
        values.append(compare(rows[0], rows[1:], false_discoveries=0.05, likely=likely).p_value)
    assert max(values) <= 1
    for level in (0.1, 0.2, 0.5):
        low, _ = Proportion(sum(value <= level + 1e-9 for value in values), 200).interval(0.999)
        assert low <= level


def test_an_excess_at_every_depth_is_not_poison() -> None:
    """A hard example rests on much of its class; poison is few."""
    for seed in range(5):
        rows = draw(INPUTS + 1, seed)
        few = rows.clone()
        rows[0] += 2 * rows[1:].std(0)
        assert compare(rows[0], rows[1:], false_discoveries=0.05).p_value > 1 / (INPUTS + 1)
        few[0, :8] += 12 * few[1:].std(0)[:8]
        assert compare(few[0], few[1:], false_discoveries=0.05).p_value == 1 / (INPUTS + 1)


def test_the_threshold_keeps_the_false_discoveries() -> None:
    rows = draw(INPUTS + 1, 2).double()
    rows[0, :12] += 8 * rows[1:, :12].std(0)
    for share in (0.02, 0.05, 0.3):
        found = compare(rows[0], rows[1:], false_discoveries=share)
        fudge = rows[1:].std(0).median()
        least = found.excess[found.excess > found.threshold].min()
        expected = 0.0
        for place in range(1, INPUTS + 1):
            rest = torch.cat([rows[1:place], rows[place + 1 :]])
            excess = (rows[place] - rest.mean(0)) / (rest.std(0) + fudge)
            expected += int((excess >= least).sum()) / INPUTS
        assert expected <= share * int((found.excess > found.threshold).sum()) + 1e-9
    wide = compare(rows[0], rows[1:], false_discoveries=0.3).threshold
    assert wide <= compare(rows[0], rows[1:], false_discoveries=0.02).threshold


def test_the_likely_have_a_threshold_of_their_own_and_the_others_a_stricter_one() -> None:
    rows = draw(INPUTS + 1, 4)
    likely = torch.zeros(EXAMPLES, dtype=torch.bool)
    likely[:30] = True
    planted = torch.tensor([2, 5, 11, 17, 23])
    rows[0, planted] += 12 * rows[1:].std(0)[planted]
    both = compare(rows[0], rows[1:], false_discoveries=0.2, likely=likely)
    # Each group has the threshold that it would have alone with this excess.
    assert set(both.selected.nonzero()[:, 0].tolist()) >= set(planted.tolist())
    strict = compare(rows[0], rows[1:], false_discoveries=0.02)
    loose = compare(rows[0], rows[1:], false_discoveries=0.2)
    assert torch.equal(both.excess, loose.excess)
    assert both.p_value == 2 * loose.p_value
    assert bool((loose.selected == (loose.excess > loose.threshold)).all())
    unlikely = compare(rows[0], rows[1:], false_discoveries=0.2, likely=torch.zeros_like(likely))
    assert torch.equal(unlikely.selected, strict.selected)
    assert unlikely.threshold == float("inf")


def test_the_collapse_of_a_calibration_input_for_itself_is_left_out() -> None:
    rows = draw(INPUTS + 1, 3)
    ignore = torch.arange(INPUTS) * 2
    ignore[3] = -1
    loud = rows.clone()
    for place, index in enumerate(ignore.tolist()):
        if index >= 0:
            loud[1 + place, index] = 1e6
    kept = compare(loud[0], loud[1:], false_discoveries=0.05, ignore=ignore)
    other = compare(rows[0], rows[1:], false_discoveries=0.05, ignore=ignore)
    assert torch.equal(kept.excess, other.excess)
    assert kept.p_value == other.p_value
    assert not torch.equal(kept.excess, compare(rows[0], rows[1:], false_discoveries=0.05).excess)
    # The mean of the others replaces it.
    place, index = 5, int(ignore[5])
    assert place != 3
    column = torch.cat([rows[1 : 1 + place, index], rows[2 + place :, index]]).double()
    filled = rows[1:].double().clone()
    filled[place, index] = column.mean()
    for row, column_index in enumerate(ignore.tolist()):
        if column_index >= 0 and row != place:
            filled[row, column_index] = torch.cat(
                [filled[:row, column_index], filled[row + 1 :, column_index]]
            ).mean()
    assert torch.allclose(
        other.excess, compare(rows[0].double(), filled, false_discoveries=0.05).excess, atol=1e-9
    )


@pytest.mark.parametrize("share", [0.1, 0.6, 1.0], ids=["some", "most", "all"])
@pytest.mark.parametrize("count", [3, 19])
def test_columns_without_spread_are_safe(share: float, count: int) -> None:
    rows = draw(count + 1, 8)
    constant = int(share * EXAMPLES)
    rows[:, :constant] = 0.0
    found = compare(rows[0], rows[1:], false_discoveries=0.05)
    assert bool(torch.isfinite(found.excess).all())
    assert bool((found.excess[:constant] == 0).all())
    assert math.isfinite(found.statistic)
    assert 1 / (count + 1) <= found.p_value <= 1
    if share == 1.0:
        assert found.p_value == 1
    rows[0, 0] = 5.0
    odd = compare(rows[0], rows[1:], false_discoveries=0.05)
    assert bool(torch.isfinite(odd.excess).all())
    assert float(odd.excess[0]) > 0


def test_fewer_examples_than_depths() -> None:
    rows = draw(INPUTS + 1, 9)[:, :2]
    found = compare(rows[0], rows[1:], false_discoveries=0.05)
    assert found.excess.shape == (2,)
    assert 0 < found.p_value <= 1


def test_nothing_is_selected_where_calibration_inputs_have_more_there() -> None:
    rows = draw(INPUTS + 1, 10)
    assert compare(rows[1:].mean(0), rows[1:], false_discoveries=0.01).threshold == float("inf")


LIKELY = torch.arange(EXAMPLES) % 3 == 0


def planted(seed: int, where: Tensor, height: float) -> Tensor:
    rows = draw(INPUTS + 1, seed)
    rows[0, where] += height * rows[1:].std(0)[where]
    return rows


def test_seeds_are_the_upper_half_of_what_is_selected_by_excess() -> None:
    where = LIKELY.nonzero()[:8, 0]
    for seed in range(5):
        rows = planted(seed, where, 12)
        found = decide(rows[0], rows[1:], LIKELY, level=0.1, false_discoveries=0.1)
        selected = compare(rows[0], rows[1:], false_discoveries=0.1, likely=LIKELY).selected & LIKELY
        assert found.found
        assert found.p_value == pytest.approx(2 / (INPUTS + 1))
        assert len(found.seeds) == int(selected.sum()) // 2
        ranking = found.excess.argsort(descending=True)
        assert (
            found.seeds.tolist()
            == [row for row in ranking.tolist() if bool(selected[row])][: len(found.seeds)]
        )
        assert set(found.seeds.tolist()) <= set(where.tolist())


def test_examples_of_other_labels_are_seeds_only_where_the_label_alone_does_not_suffice() -> None:
    others = (~LIKELY).nonzero()[:12, 0]
    both = torch.cat([LIKELY.nonzero()[:8, 0], others])
    for seed in range(5):
        rows = planted(seed, both, 20)
        found = decide(rows[0], rows[1:], LIKELY, level=0.1, false_discoveries=0.1)
        assert bool(LIKELY[found.seeds].all())
        rows = planted(seed, others, 20)
        found = decide(rows[0], rows[1:], LIKELY, level=0.1, false_discoveries=0.1)
        assert found.found
        assert set(found.seeds.tolist()) <= set(others.tolist())


def test_found_exactly_when_the_p_value_is_at_most_the_level_and_something_is_selected() -> None:
    where = LIKELY.nonzero()[:8, 0]
    for seed in range(20):
        rows = planted(seed, where, (0, 3, 6, 12)[seed % 4])
        for level in (0.1, 0.3):
            found = decide(rows[0], rows[1:], LIKELY, level=level, false_discoveries=0.1)
            outcome = compare(rows[0], rows[1:], false_discoveries=0.1, likely=LIKELY)
            assert found.p_value == outcome.p_value
            assert found.found == (outcome.p_value <= level + 1e-9 and bool(outcome.selected.any()))


def test_in_doubt_the_ten_likely_examples_of_largest_excess_are_seeds_and_else_none() -> None:
    doubted = 0
    for seed in range(20):
        rows = draw(INPUTS + 1, seed)
        found = decide(rows[0], rows[1:], LIKELY, level=0.05, false_discoveries=0.01)
        if found.found:
            continue
        ranking = [row for row in found.excess.argsort(descending=True).tolist() if bool(LIKELY[row])]
        assert found.seeds.tolist() == (ranking[:10] if found.p_value <= 0.5 else [])
        doubted += found.p_value <= 0.5
    assert 0 < doubted < 20
