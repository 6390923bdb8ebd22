"""Metrics against numbers by hand, and intervals against their definition."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from fake_stages import make_row

from unpoison._statistics import Proportion
from unpoison.errors import InputError
from unpoison.evaluation import Line, Results, bootstrap, compare, leaderboard, tango
from unpoison.evaluation._results import ROW


def results(rows: list[dict[str, Any]], planned: int | None = None) -> Results:
    schema = ROW.append(pa.field("key", pa.string()))
    keyed = [{**dict.fromkeys(schema.names), **row, "key": f"{place:032x}"} for place, row in enumerate(rows)]
    table = pa.Table.from_pylist(keyed, schema=schema)
    return Results("made", table, len(rows) if planned is None else planned, (), Path(), {})


def line(rows: list[dict[str, Any]]) -> Line:
    [only] = leaderboard(results(rows))
    return only


def test_a_line_by_hand() -> None:
    found = line([make_row(0, "corner"), make_row(10, "corner", attack_successes=21, average_precision=1.0)])
    assert found.n == 2
    assert found.success == Proportion(1, 2)
    assert found.success_rate.mean == pytest.approx((0.1 + 0.525) / 2)
    assert found.success_rate.deviation == pytest.approx(0.425 / math.sqrt(2))
    assert found.clean_accuracy.mean == pytest.approx(0.85)
    assert found.worst_class == ("right", Proportion(70, 100))
    assert found.true_positives == Proportion(10, 20)
    assert found.precision == Proportion(10, 18)
    assert found.false_positives == Proportion(8, 980)
    assert found.average_precision.mean == 0.75
    assert found.filter_bias == pytest.approx(4 / 240)
    assert found.observed == Proportion(2, 2)
    assert found.found == Proportion(2, 2)
    assert found.margin.mean == 0.5


def test_a_trial_without_anything_to_trace_has_no_ranking() -> None:
    traced = make_row(0, "corner", average_precision=0.9)
    silent = make_row(1, "corner", average_precision=0.02, observed=False)
    scanned = make_row(2, "corner", average_precision=0.7, observed=None)
    assert line([traced, silent]).average_precision.mean == 0.9
    assert line([traced, silent]).observed == Proportion(1, 2)
    assert line([silent, scanned]).average_precision.mean == 0.7


def test_half_of_the_inputs_is_no_success() -> None:
    assert line([make_row(0, attack_successes=20)]).success == Proportion(0, 1)
    assert line([make_row(0, attack_successes=21)]).success == Proportion(1, 1)


def test_lines_without_detector_have_nothing_to_judge() -> None:
    found = line([make_row(0)])
    assert found.true_positives == Proportion(0, 0)
    assert found.filter_bias is None
    assert math.isnan(found.success_rate.deviation)
    assert found.to_dict()["true_positives"]["rate"] is None


def test_methods_budgets_and_controls_are_lines_of_their_own() -> None:
    rows = [
        make_row(0),
        make_row(1),
        make_row(0, "corner"),
        make_row(0, "corner", budget=0.04),
        make_row(0, "random", control="random filter"),
    ]
    assert [one.n for one in leaderboard(results(rows))] == [2, 1, 1, 1]


def test_trials_of_one_target_are_one_value_of_the_interval() -> None:
    def trials(target: str, hits: str) -> list[dict[str, Any]]:
        return [
            make_row(0, number=number, target=target, attack_total=1, attack_successes=int(hit == "x"))
            for number, hit in enumerate(hits)
        ]

    found = line([*trials("a", "xx"), *trials("b", "x."), *trials("c", "xxxx")])
    assert found.success == Proportion(7, 8)
    assert (found.success_by_target.mean, found.success_by_target.n) == (pytest.approx(2.5 / 3), 3)
    # Means 1, 1/2 and 1: deviation .2887; 4.303 is Student's quantile for two degrees of freedom.
    low, high = found.target_interval or (0.0, 0.0)
    assert low == pytest.approx(2.5 / 3 - 4.303 * 0.28868 / 3**0.5, abs=1e-3)
    assert high == 1.0
    assert line(trials("a", "x.")).target_interval is None
    assert found.to_dict()["success_by_target"]["interval"][1] == 1.0


def test_attacks_are_compared_on_the_same_targets_and_victims() -> None:
    def trials(attack: str, **hits: str) -> Line:
        return line(
            [
                make_row(0, attack=attack, target=target, number=number, attack_total=1)
                | {"attack_successes": int(hit == "x")}
                for target, marks in hits.items()
                for number, hit in enumerate(marks)
            ]
        )

    first = trials("one", a="xx", b="x.", c="xx", d="xx")
    # Of c there is one victim yet, of d none.
    found = compare(first, trials("two", a=".x", b="x.", c=".")).success_by_target
    # Differences 1/2, 0 and 1.
    assert (found.mean, found.n) == (0.5, 3)
    assert found.interval() == pytest.approx(
        (0.5 - 4.303 * 0.5 / 3**0.5, 0.5 + 4.303 * 0.5 / 3**0.5), abs=1e-3
    )


def test_lines_of_clean_victims_have_no_attack_success() -> None:
    nothing = {"attack_successes": None, "attack_total": None, "margin": None, "poisons": 0}
    found = line([make_row(0, "corner", attack="none", found=False, true_positives=0, **nothing)])
    assert found.success == Proportion(0, 0)
    assert found.found == Proportion(0, 1)
    assert found.to_dict()["margin"]["mean"] is None


def test_lines_of_clean_victims_are_compared() -> None:
    clean = {"attack": "none", "attack_successes": None, "attack_total": None}
    first, second = (line([make_row(seed, **clean) for seed in (1, 2)]) for _ in range(2))
    assert compare(first, second).success[0] == 0


def test_compared_on_the_trials_that_both_have() -> None:
    first = line([make_row(seed, "corner") for seed in (0, 1, 2)])
    second = line([make_row(seed) for seed in (1, 2, 3)])
    found = compare(first, second)
    assert found.n == 2
    assert found.success[0] == -1.0
    assert found.success_rate == pytest.approx((-0.65, -0.65, -0.65))
    assert found.accuracy == (0.0, 0.0, 0.0)
    with pytest.raises(InputError, match="no trial in common"):
        compare(first, line([make_row(9)]))


def test_pairing_narrows_the_interval() -> None:
    """Accuracies that move together from trial to trial, one method always two points above the other."""
    first = line([make_row(seed, "corner", clean_correct=42 + 5 * seed) for seed in range(10)])
    second = line([make_row(seed, clean_correct=40 + 5 * seed) for seed in range(10)])
    difference, low, high = compare(first, second).accuracy
    assert (difference, low, high) == pytest.approx((0.02, 0.02, 0.02))
    assert first.clean_accuracy.deviation > 0.1


def restricted_likelihood(b: int, c: int, n: int, delta: float) -> float:
    """The share q of "only second" that makes the table most likely when p - q = delta, by search."""
    low, high = max(0.0, -delta), (1 - delta) / 2

    def loss(q: float) -> float:
        parts = ((b, q + delta), (c, q), (n - b - c, 1 - 2 * q - delta))
        if any(count and share <= 0 for count, share in parts):
            return math.inf
        return -sum(count * math.log(share) for count, share in parts if count)

    for _ in range(200):
        third = (high - low) / 3
        if loss(low + third) < loss(high - third):
            high -= third
        else:
            low += third
    return (low + high) / 2


@pytest.mark.parametrize(("b", "c", "n"), [(12, 2, 68), (9, 5, 30), (1, 7, 20), (3, 3, 9)])
def test_tango_solves_its_score_equation(b: int, c: int, n: int) -> None:
    difference, low, high = tango(b, c, n)
    assert low < difference < high
    for bound in (low, high):
        q = restricted_likelihood(b, c, n, bound)
        variance = n * (2 * q + bound * (1 - bound))
        assert abs(b - c - n * bound) / math.sqrt(variance) == pytest.approx(1.959964, abs=1e-4)


@pytest.mark.parametrize(("b", "c", "n"), [(0, 0, 9), (9, 0, 9), (0, 9, 9), (1, 0, 1)])
def test_tango_at_the_ends(b: int, c: int, n: int) -> None:
    difference, low, high = tango(b, c, n)
    assert -1 <= low <= difference <= high <= 1
    assert high > low
    mirrored = tango(c, b, n)
    assert mirrored == pytest.approx((-difference, -high, -low), abs=1e-9)


def test_tango_without_discordant_pairs_is_the_known_form() -> None:
    """With b = c = 0 the score interval is +-z^2 / (n + z^2)."""
    z = 1.959964
    assert tango(0, 0, 20)[2] == pytest.approx(z * z / (20 + z * z), abs=1e-5)


def test_the_bootstrap_is_seeded_and_covers() -> None:
    values = [0.01 * place for place in range(20)]
    assert bootstrap(values, seed=1) == bootstrap(values, seed=1) != bootstrap(values, seed=2)
    mean, low, high = bootstrap(values)
    assert low < mean < high
    assert high - low == pytest.approx(2 * 1.96 * 0.0577 / math.sqrt(20), rel=0.15)
