"""Sweeps: every stage once, whoever is killed, whatever is damaged, and one table in the end."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import fake_stages
import pytest
from fake_stages import InlineExecutor, make_plan

from unpoison.errors import InputError
from unpoison.evaluation import LocalExecutor, Plan, Results, Stage, Store, SweepProgress, sweep


def done(log: Path) -> Counter[str]:
    return Counter(log.read_text().splitlines()) if log.exists() else Counter()


def test_every_stage_is_done_once_after_what_it_reads(tmp_path: Path) -> None:
    plan = make_plan(tmp_path / "log", trials=3)
    results = sweep(plan, tmp_path / "store", InlineExecutor())
    assert set(done(tmp_path / "log").values()) == {1}
    assert len(done(tmp_path / "log")) == len(plan.stages) == 8
    place = Store(tmp_path / "store").place(plan.rows[1])
    assert (place / "text").read_text() == "measure 1(find 1(victim(poison())))"
    assert results.table["key"].to_pylist() == list(plan.rows)
    assert results.table["seed"].to_pylist() == [0, 0, 1]
    assert results.failures == ()


def test_the_same_sweep_again_does_nothing_and_gives_the_same_table(tmp_path: Path) -> None:
    plan = make_plan(tmp_path / "log")
    first = sweep(plan, tmp_path / "store", InlineExecutor())
    seen: list[SweepProgress] = []
    second = sweep(plan, tmp_path / "store", InlineExecutor(), watch=lambda now, _: seen.append(now))
    assert set(done(tmp_path / "log").values()) == {1}
    assert seen[-1].cached.total() == 8
    assert second.table.equals(first.table)
    assert second.fingerprint == first.fingerprint


def test_a_larger_plan_does_only_what_is_new(tmp_path: Path) -> None:
    sweep(make_plan(tmp_path / "log", trials=2), tmp_path / "store", InlineExecutor())
    grown = sweep(make_plan(tmp_path / "log", trials=4), tmp_path / "store", InlineExecutor())
    assert set(done(tmp_path / "log").values()) == {1}
    assert len(grown.table) == 4


def test_costs_do_not_change_the_fingerprint_and_results_do(tmp_path: Path) -> None:
    results = [
        sweep(make_plan(tmp_path / "log", trials=n), tmp_path / f"store {place}", InlineExecutor())
        for place, n in enumerate((3, 3, 4))
    ]
    assert not results[0].costs.equals(results[1].costs)
    assert results[0].fingerprint == results[1].fingerprint != results[2].fingerprint
    assert results[0].deterministic.equals(results[1].deterministic)


def test_keys_depend_on_configuration_and_inputs_alone() -> None:
    stage = Stage("find", "a:b", {"x": 1}, {"victim": "k"}, {"data": "here"})
    assert Stage("find", "a:b", {"x": 1}, {"victim": "k"}, {"data": "there"}).key == stage.key
    for other in (
        Stage("find", "a:b", {"x": 2}, {"victim": "k"}),
        Stage("find", "a:b", {"x": 1}, {"victim": "l"}),
        Stage("find", "a:c", {"x": 1}, {"victim": "k"}),
    ):
        assert other.key != stage.key


def damage_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["text", "stage.json", "row.parquet"])
@pytest.mark.parametrize("how", ["changed", "cut", "gone"])
def test_a_damaged_artefact_is_noticed_and_made_again(name: str, how: str, tmp_path: Path) -> None:
    plan = make_plan(tmp_path / "log")
    store = Store(tmp_path / "store")
    first = sweep(plan, store.root, InlineExecutor())
    path = store.place(plan.rows[0]) / name
    if how == "changed":
        if name == "stage.json":
            path.write_text(path.read_text().replace('"digests"', '"digetss"'))
        else:
            damage_byte(path)
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        path.unlink()
    lines: list[str] = []
    second = sweep(plan, store.root, InlineExecutor(), watch=lambda _, line: lines.append(line))
    assert done(tmp_path / "log")["measure 0"] == 2
    assert sum(done(tmp_path / "log").values()) == 9
    assert any("damaged" in line for line in lines)
    assert second.fingerprint == first.fingerprint
    assert store.state(plan.rows[0]) == "sound"


def test_a_lost_poison_is_made_again(tmp_path: Path) -> None:
    plan = make_plan(tmp_path / "log")
    store = Store(tmp_path / "store")
    first = sweep(plan, store.root, InlineExecutor())
    damage_byte(store.place(plan.stages[0].key) / "text")
    assert sweep(plan, store.root, InlineExecutor()).fingerprint == first.fingerprint
    assert done(tmp_path / "log")["poison"] == 2
    assert store.state(plan.stages[0].key) == "sound"


def test_the_packed_table_is_only_a_copy(tmp_path: Path) -> None:
    plan = make_plan(tmp_path / "log")
    first = sweep(plan, tmp_path / "store", InlineExecutor())
    packed = tmp_path / "store" / "tables" / "fake.parquet"
    damage_byte(packed)
    assert Results.read(tmp_path / "store").table.equals(first.table)
    packed.unlink()
    assert Results.read(tmp_path / "store").table.equals(first.table)


def test_a_failing_stage_takes_only_its_trial_with_it(tmp_path: Path) -> None:
    broken = make_plan(tmp_path / "log", broken=["find 1"])
    seen: list[SweepProgress] = []
    results = sweep(broken, tmp_path / "store", InlineExecutor(), watch=lambda now, _: seen.append(now))
    assert results.planned == 3
    assert results.table["key"].to_pylist() == [broken.rows[0], broken.rows[2]]
    assert results.failures == ("ValueError: this stage | is <broken>",)
    assert seen[-1].failed == {"find": 1, "measure": 1}
    assert seen[-1].open == 0
    told = Store(tmp_path / "store").failed(broken.stages[4].key)
    assert "fake_stages.py" in told.read_text()
    # Whatever was wrong has been mended: only that trial is done.
    mended = sweep(make_plan(tmp_path / "log"), tmp_path / "store", InlineExecutor())
    assert len(mended.table) == 3
    assert mended.failures == ()
    assert not told.exists()
    assert done(tmp_path / "log")["find 0"] == 1


def test_a_failing_first_stage_gives_up_everything(tmp_path: Path) -> None:
    results = sweep(make_plan(tmp_path / "log", broken=["poison"]), tmp_path / "store", InlineExecutor())
    assert len(results.table) == 0
    assert len(results.failures) == 1
    assert done(tmp_path / "log") == {"poison": 1}


def test_a_store_is_used_by_one_sweep_at_a_time(tmp_path: Path) -> None:
    with Store(tmp_path / "store").alone(), pytest.raises(InputError, match="another sweep is using"):
        sweep(make_plan(tmp_path / "log"), tmp_path / "store", InlineExecutor())


def test_what_a_killed_sweep_left_half_written_is_cleared_away(tmp_path: Path) -> None:
    plan = make_plan(tmp_path / "log")
    place = Store(tmp_path / "store").place(plan.rows[0])
    leftover = place.with_name(f".{place.name}.abcd1234.partial")
    leftover.mkdir(parents=True)
    (leftover / "text").write_text("half")
    sweep(plan, tmp_path / "store", InlineExecutor())
    assert not leftover.exists()
    assert not list((tmp_path / "store").rglob("*.partial"))


def test_recipes_are_told_apart(tmp_path: Path) -> None:
    for name in ("one", "two"):
        sweep(make_plan(tmp_path / "log", name=name), tmp_path / "store", InlineExecutor())
    assert set(done(tmp_path / "log").values()) == {1}
    assert len(Results.read(tmp_path / "store", "two").table) == 3
    with pytest.raises(InputError, match="name one of its recipes: one, two"):
        Results.read(tmp_path / "store")
    with pytest.raises(InputError, match="has no recipe 'three'"):
        Results.read(tmp_path / "store", "three")


def test_local_workers_give_the_same_table_and_one_that_dies_is_replaced(tmp_path: Path) -> None:
    expected = sweep(make_plan(tmp_path / "a.log", trials=4), tmp_path / "inline", InlineExecutor())
    plan = make_plan(tmp_path / "b.log", trials=4, killer="find 2")
    with LocalExecutor(2) as executor:
        found = sweep(plan, tmp_path / "local", executor)
    assert (tmp_path / "b.killed").exists()
    assert found.failures == ()
    assert found.fingerprint == expected.fingerprint


def start(tmp_path: Path, trials: int, seconds: float) -> subprocess.Popen[bytes]:
    arguments = [tmp_path / "log", tmp_path / "store", trials, seconds]
    return subprocess.Popen([sys.executable, fake_stages.__file__, *map(str, arguments)])


def wait_for(log: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while done(log).total() < count and time.monotonic() < deadline:
        time.sleep(0.01)
    assert done(log).total() >= count


def test_killed_at_random_moments_the_sweep_goes_on_to_the_same_table(tmp_path: Path) -> None:
    expected = sweep(make_plan(tmp_path / "other", trials=6), tmp_path / "whole", InlineExecutor())
    moments = random.Random(0)
    for count in (2, 7):
        process = start(tmp_path, 6, 0.1)
        wait_for(tmp_path / "log", count)
        time.sleep(moments.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
    time.sleep(1.0)  # workers notice that they are orphans
    results = sweep(make_plan(tmp_path / "log", trials=6, seconds=0.1), tmp_path / "store", InlineExecutor())
    assert results.fingerprint == expected.fingerprint
    assert not list((tmp_path / "store").rglob("*.partial"))
    # At most what the two workers were doing was done twice.
    assert done(tmp_path / "log").total() <= 14 + 2 * 2 * 2


def test_workers_do_not_outlive_the_sweep(tmp_path: Path) -> None:
    process = start(tmp_path, 200, 0.1)
    wait_for(tmp_path / "log", 3)
    process.send_signal(signal.SIGINT)
    process.wait(30)
    time.sleep(0.3)
    before = done(tmp_path / "log").total()
    time.sleep(0.5)
    assert done(tmp_path / "log").total() == before


def test_a_guess_of_the_time_left() -> None:
    progress = SweepProgress(workers=2)
    progress.total.update({"train": 4, "find": 2})
    assert progress.seconds_left is None
    progress.done["train"] = 1
    progress.seconds["train"].append(10.0)
    assert progress.seconds_left == pytest.approx((3 * 10 + 2 * 10) / 2)
    assert progress.open == 5


@pytest.mark.parametrize("workers", [0, -1])
def test_too_few_workers_are_refused(workers: int) -> None:
    with pytest.raises(InputError, match="needs at least 1"):
        LocalExecutor(workers)


def test_an_empty_plan_is_an_empty_table(tmp_path: Path) -> None:
    assert len(sweep(Plan("none", {}, (), ()), tmp_path / "store", InlineExecutor()).table) == 0


def test_a_row_that_is_there_stays_when_what_it_was_made_of_cannot_be_made_again(tmp_path: Path) -> None:
    plan = make_plan(tmp_path / "log")
    store = Store(tmp_path / "store")
    sweep(plan, store.root, InlineExecutor())
    damage_byte(store.place(plan.stages[1].key) / "text")  # the victim
    damage_byte(store.place(plan.stages[2].key) / "text")  # a find stage, which reads it
    seen: list[SweepProgress] = []
    broken = make_plan(tmp_path / "log", broken=["victim"])
    results = sweep(broken, store.root, InlineExecutor(), watch=lambda now, _: seen.append(now))
    assert seen[-1].failed == {"train": 1, "find": 1}
    assert seen[-1].open == 0
    assert len(results.table) == 3


def test_a_stage_that_kills_every_worker_fails_in_the_end(tmp_path: Path) -> None:
    plan = make_plan(tmp_path / "log", trials=1, killer="find 0", always=True)
    with LocalExecutor(1) as executor:
        results = sweep(plan, tmp_path / "store", executor)
    assert results.failures == ("the worker died 3 times; out of memory?",)
    assert done(tmp_path / "log") == {"poison": 1, "victim": 1, "find 0": 3}
