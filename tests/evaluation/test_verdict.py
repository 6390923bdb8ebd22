"""The verdict's benchmark: which trials count for which rate."""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks import verdict
from benchmarks._harness import Bench

PLAIN: dict[str, Any] = {
    "set": "sample",
    "attack": "badnets",
    "budget": 0.01,
    "asked": "attack",
    "several": False,
    "success": 0.9,
    "accuracy": 0.9,
    "p_value": 0.009,
    "found": True,
    "poisons": 10,
    "flagged": 10,
    "true_positives": 9,
}
REPAIRED: dict[str, Any] = {
    **PLAIN,
    "success_after": 0.0,
    "accuracy_after": 0.9,
    "success_perfect": 0.0,
    "accuracy_perfect": 0.9,
    "rounds": 1,
    "outcome": "repaired",
}
ERROR: dict[str, Any] = {**PLAIN, "asked": "errors", "found": False, "flagged": 0, "true_positives": 0}


def rates(*trials: dict[str, Any]) -> dict[str, tuple[int, int]]:
    bench = Bench(argparse.Namespace(), list(trials))
    verdict.summarise(bench)
    return {name: (rate["successes"], rate["trials"]) for name, rate in bench.rates.items()}


def test_power_is_of_victims_whose_trigger_works() -> None:
    missed = {**PLAIN, "set": "signs", "budget": 0.002, "p_value": 0.04, "found": False}
    given = rates(PLAIN, missed, {**PLAIN, "success": 0.4})
    assert given["found"] == (1, 2)
    assert given["found, 0.2 %"] == given["found, signs"] == (0, 1)
    assert given["found, 1 %"] == given["found, sample"] == (1, 1)
    assert given["p at most .05"] == (2, 2)
    assert given["recall of those found"] == (9, 10)
    assert given["recall of all"] == (18, 20)
    assert given["healed"] == (0, 0)


def test_several_inputs_are_counted_apart() -> None:
    apart = {**PLAIN, "several": True}
    given = rates(PLAIN, {**PLAIN, "found": False}, apart, {**ERROR, "several": True, "attack": "none"})
    assert given["found"] == (1, 2)
    assert given["found, several inputs"] == (1, 1)
    assert given["recall, several inputs"] == (9, 10)
    assert given["false_alarms_01"] == (0, 0)
    assert given["false_alarms_01_several"] == (1, 1)


def test_false_alarms_are_errors_that_the_poison_did_not_cause() -> None:
    clean = {**ERROR, "attack": "none", "success": None, "p_value": 0.01}
    given = rates(clean, {**clean, "set": "signs", "p_value": 0.05}, {**ERROR, "p_value": 0.3})
    assert given["false_alarms_01"] == (1, 2)
    assert given["false_alarms_05"] == (2, 2)
    assert given["false_alarms_05_signs"] == (1, 1)
    assert given["false_alarms_05_poisoned"] == (0, 1)
    assert given["false_alarms_05_right"] == given["found"] == (0, 0)


def test_healed_is_what_repair_left() -> None:
    rest = {**REPAIRED, "success_after": 0.03, "rounds": 3, "outcome": "poison remains"}
    worse = {**REPAIRED, "accuracy_after": 0.88}
    given = rates(REPAIRED, rest, worse, {**REPAIRED, "found": False, "rounds": 0})
    assert given["healed"] == (1, 3)
    assert given["healed, of those that the perfect filter heals"] == (1, 3)
    without = {**rest, "success_perfect": 0.2}
    assert rates(REPAIRED, without)["healed, of those that the perfect filter heals"] == (1, 1)
    assert given["no longer works, of those"] == (2, 3)
    assert given["last trace empty"] == (2, 3)
    assert given["rounds, 1"] == (2, 3)
    assert given["rounds, 3"] == (1, 3)


def test_a_trial_that_is_traced_anew_keeps_a_repair_of_the_same_flags() -> None:
    place = dict.fromkeys(("source", "target", "victim", "seed", "number", "observation"), "")
    old, anew = {**REPAIRED, **place}, {**PLAIN, **place, "p_value": 0.008}
    assert verdict.pooled([old], [anew]) == [{**old, "p_value": 0.008}]
    for name, value in (("flagged", 11), ("true_positives", 8), ("success", 0.8), ("accuracy", 0.8)):
        assert verdict.pooled([old], [{**anew, name: value}]) == [{**anew, name: value}]
    unknown = {name: value for name, value in old.items() if name != "accuracy"}
    assert verdict.pooled([unknown], [anew]) == [anew]
    own = {**anew, "success_after": 0.5}
    assert verdict.pooled([old], [own])[0]["success_after"] == 0.5
    assert verdict.pooled([], [anew]) == [anew]
    assert len(verdict.pooled([old], [{**anew, "set": "signs"}])) == 2
