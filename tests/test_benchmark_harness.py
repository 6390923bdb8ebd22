"""Both sides of a comparison are treated alike, and what was measured is stored in the shape that is read."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from benchmarks import _harness
from benchmarks._harness import Bench, Timed


def bench(**options: Any) -> Bench:
    return Bench(
        argparse.Namespace(**{"repeats": 3, "threads": 1, "quick": False, "clock": "wall", **options})
    )


def test_sides_warm_up_and_take_turns() -> None:
    called = []
    found = bench().compare("w", {side: lambda side=side: called.append(side) or side for side in "ab"})
    assert called[:2] in (["a", "b"], ["b", "a"])  # the warm-up
    rounds = ["".join(called[place : place + 2]) for place in range(0, 8, 2)]
    assert rounds[1:] == ["ba", "ab", "ba"]
    assert found == {"a": "a", "b": "b"}


def test_seconds_ratios_and_peaks_are_noted() -> None:
    one, times = bench(), {"ours": iter((9.0, 2.0, 1.0, 4.0)), "theirs": iter((9.0, 6.0, 5.0, 3.0))}
    sides = {side: lambda side=side: Timed(next(times[side]), side) for side in times}
    assert one.compare("work", sides, differs="the order") == {"ours": "ours", "theirs": "theirs"}
    record = one.record()
    assert record["seconds"]["work"]["ours"] == {"minimum": 1.0, "median": 2.0, "n": 3}
    assert record["ratios"] == {"work, theirs": 3.0}
    assert record["differs"] == {"work": "the order"}
    assert set(record["peak_bytes"]["work"]) == {"ours", "theirs"}
    assert record["peak_bytes"]["work"]["ours"] > 1_000_000


def test_a_warm_side_runs_only_as_often_as_it_is_measured() -> None:
    called = []
    bench().compare("w", {"ours": lambda: called.append(1)}, warm=True, repeats=2)
    bench(quick=True).compare("w", {"ours": lambda: called.append(1)}, warm=True)
    assert len(called) == 3


def test_memory_is_that_of_one_side() -> None:
    one = bench(repeats=1)
    sides = {"small": lambda: len(b"x" * 1000), "large": lambda: len(b"x" * 200_000_000)}
    one.compare("w", sides)
    peaks = one.peak_bytes["w"]
    if sys.platform == "linux":
        assert peaks["large"] - peaks["small"] > 150_000_000


def test_the_processor_clock_does_not_count_waiting() -> None:
    one = bench(clock="processor", repeats=1)
    one.compare("w", {"ours": lambda: time.sleep(0.2)})
    assert one.seconds["w"]["ours"]["minimum"] < 0.1


def test_a_trial_is_done_once() -> None:
    kept, called = [], []
    one = Bench(argparse.Namespace(), [{"name": "a", "seed": 0, "x": 1}], lambda it: kept.append(it.record()))
    for name in "aab":
        one.trial({"name": name, "seed": 0}, lambda: called.append(1) or {"x": 2})
    assert one.record()["trials"] == [{"name": "a", "seed": 0, "x": 1}, {"name": "b", "seed": 0, "x": 2}]
    assert len(called) == len(kept) == 1


def test_a_run_is_stored_with_where_it_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_harness, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmarks/thing.py", "--size", "7", "--names", "x", "y"])

    def measure(bench: Bench) -> None:
        bench.compare("work", {"ours": lambda: None, "theirs": lambda: None})
        bench.work = {"size": bench.options.size, "names": bench.options.names}

    _harness.main(measure, threads=1, size=3, names=["z"])
    record = json.loads((tmp_path / "thing.json").read_text(encoding="utf-8"))
    assert record["work"] == {"size": 7, "names": ["x", "y"], "clock": "wall"}
    assert record["command"] == "python -m benchmarks.thing --size 7 --names x y"
    assert {"ratios", "agreement", "seconds", "peak_bytes", "rates", "machine", "date", "commit"} <= set(
        record
    )
    assert json.loads(capsys.readouterr().out) == record["ratios"]
    (tmp_path / "thing.json").unlink()
    monkeypatch.setattr(sys, "argv", ["benchmarks/thing.py", "--quick"])
    _harness.main(measure, threads=1, size=3, names=["z"])
    assert not (tmp_path / "thing.json").exists()


def test_each_trial_is_a_line_of_the_stored_record() -> None:
    record = {"rates": {"hit": {"successes": 1, "trials": 2}}, "trials": [{"seed": 1}, {"seed": 2, "é": []}]}
    text = _harness.encoded(record)
    assert json.loads(text) == record
    assert '\n  {"seed": 1},\n  {"seed": 2, "é": []}\n' in text
    assert json.loads(_harness.encoded({"rates": {}})) == {"rates": {}}
