"""What the machinery of sweeps costs: overhead a trial, reading a large store, and what a second worker
gives.

    python -m benchmarks.sweep --json [--no-write] [--trials 1000] [--rows 10000]

Three measurements. `overhead`: a sweep of 1,000 trials whose stages do nothing (a poison and a victim that
all share, a find and a measure stage a trial), on one worker; seconds a trial, and the same again with
everything in the store. `leaderboard`: reading a store of 10,000 trials and writing the page. `workers`: the
same 16 stages of equal, single-threaded arithmetic with one worker and with two; there is no peer to compare
with, so `ratios` holds the seconds of one worker over those of two. Written to benchmarks/results/sweep.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unpoison.evaluation import LocalExecutor, Plan, Results, Stage, sweep, write_row

STAGE = "benchmarks.sweep:"
Values = Mapping[str, Any]


def empty(configuration: Values, inputs: Mapping[str, Path], surroundings: Values, out: Path) -> None:
    """A stage of no work; a measure stage writes a row as large as a real one."""
    if configuration["row"] is None:
        (out / "nothing").touch()
    else:
        write_row(out, configuration["row"], {"seconds_find": 0.0, "peak_bytes": 0.0})


def busy(configuration: Values, inputs: Mapping[str, Path], surroundings: Values, out: Path) -> None:
    """A fixed amount of single-threaded matrix products."""
    import torch

    torch.set_num_threads(1)
    matrix = torch.full((384, 384), 1e-3)
    for _ in range(surroundings["products"]):
        matrix = torch.tanh(matrix @ matrix)
    (out / "nothing").touch()


def row(trial: int) -> dict[str, Any]:
    """A row of one of ten methods."""
    return {
        "attack": "none",
        "budget": 0.01,
        "source": "a",
        "target": "b",
        "seed": trial // 10,
        "defense": "none",
        "detector": f"method {trial % 10}",
        "unlearner": "retrain",
        "control": "" if trial % 10 else "random filter",
        "poisons": 50,
        "poison_share": 0.01,
        "clean_correct": 9000 + trial % 97,
        "clean_total": 10000,
        "attack_successes": trial % 101,
        "attack_total": 100,
        "class_names": [f"class {label}" for label in range(10)],
        "class_correct": [900] * 10,
        "class_total": [1000] * 10,
        "observed": True,
        "flagged": 50,
        "caught": 40,
        "clean_flagged": 10,
        "clean_examples": 49950,
        "average_precision": 0.8,
        "class_clean_flagged": [1] * 10,
        "class_clean": [4995] * 10,
    }


def plan_of(trials: int) -> Plan:
    """A shared poison and victim, and two stages a trial."""

    def stage(kind: str, name: str, inputs: dict[str, str], values: Any = None) -> Stage:
        return Stage(kind, f"{STAGE}empty", {"name": name, "row": values}, inputs)

    poison = stage("craft", "poison", {})
    victim = stage("train", "victim", {"poison": poison.key})
    stages, rows = [poison, victim], []
    for trial in range(trials):
        stages.append(stage("find", f"find {trial}", {"victim": victim.key}))
        stages.append(stage("measure", f"measure {trial}", {"findings": stages[-1].key}, row(trial)))
        rows.append(stages[-1].key)
    return Plan("empty", {"description": "stages of no work"}, tuple(stages), tuple(rows))


def timed(plan: Plan, store: Path, workers: int) -> float:
    """Seconds of a sweep, without those that the workers take to start and to import torch."""
    warm = [Stage("craft", f"{STAGE}busy", {"warm": n}, {}, {"products": 200}) for n in range(4 * workers)]
    with LocalExecutor(workers) as executor:
        sweep(Plan("warm", {}, tuple(warm), ()), store / "warm", executor)
        started = time.perf_counter()
        sweep(plan, store / "store", executor)
        return time.perf_counter() - started


def overhead(trials: int, folder: Path) -> dict[str, float]:
    """Seconds a trial of a sweep of empty stages, first and again."""
    plan = plan_of(trials)
    first = timed(plan, folder, 1)
    again = timed(plan, folder, 1)
    return {"overhead_per_trial": first / trials, "overhead_per_cached_trial": again / trials}


def reading(rows: int, folder: Path) -> dict[str, float]:
    """Seconds from a store of so many trials to its leaderboard."""
    import pyarrow as pa

    from unpoison._artefacts import write_json
    from unpoison.evaluation._results import _KEYED
    from unpoison.report import leaderboard_html

    plan = plan_of(rows)
    write_json(
        folder / "recipes" / "empty.json",
        {
            "experiment": dict(plan.experiment),
            "rows": list(plan.rows),
            "stages": [s.key for s in plan.stages],
        },
    )
    blank = dict.fromkeys(_KEYED.names)
    table = pa.Table.from_pylist(
        [{**blank, **row(trial), "key": key} for trial, key in enumerate(plan.rows)], schema=_KEYED
    )
    Results("empty", table, rows, (), folder, {}).pack()
    started = time.perf_counter()
    results = Results.read(folder)
    read = time.perf_counter() - started
    page = leaderboard_html(results)
    assert len(results.table) == rows
    return {"read": read, "leaderboard": time.perf_counter() - started, "page_bytes": float(len(page))}


def scaling(folder: Path, products: int = 250, stages: int = 16, repeats: int = 3) -> dict[str, Any]:
    """Seconds of the same busy stages with one worker and with two, the best of a few."""
    found: dict[str, list[float]] = {"one": [], "two": []}
    for repeat in range(repeats):
        for workers, name in ((1, "one"), (2, "two")):
            work = [
                Stage("train", f"{STAGE}busy", {"stage": n}, {}, {"products": products})
                for n in range(stages)
            ]
            seconds = timed(Plan("busy", {}, tuple(work), ()), folder / f"{repeat} {name}", workers)
            found[name].append(seconds)
    return {name: {"best": min(values), "all": values} for name, values in found.items()}


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print the whole record, as one JSON object")
    parser.add_argument("--no-write", action="store_true", help="leave benchmarks/results alone")
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=10000)
    arguments = parser.parse_args()

    from benchmarks.influence import RESULTS, machine

    with tempfile.TemporaryDirectory() as folder:
        costs = overhead(arguments.trials, Path(folder, "overhead"))
        board = reading(arguments.rows, Path(folder, "board"))
        workers = scaling(Path(folder, "scaling"))
    speedup = workers["one"]["best"] / workers["two"]["best"]
    pairs = zip(workers["one"]["all"], workers["two"]["all"], strict=True)
    record = {
        "ratios": {"one worker over two": speedup},
        "agreement": {},
        "seconds": {
            **costs,
            "leaderboard_read": board["read"],
            "leaderboard": board["leaderboard"],
            "one_worker": workers["one"]["best"],
            "two_workers": workers["two"]["best"],
        },
        "peak_bytes": {},
        "speedups": [one / two for one, two in pairs],
        "median_speedup": statistics.median(
            one / two for one, two in zip(workers["one"]["all"], workers["two"]["all"], strict=True)
        ),
        "page_bytes": board["page_bytes"],
        "work": {"trials": arguments.trials, "rows": arguments.rows},
        "machine": machine(1),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join(["python -m benchmarks.sweep", *sys.argv[1:]]),
    }
    if not arguments.no_write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "sweep.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if arguments.json:
        print(json.dumps(record))
    else:
        print(json.dumps(record["seconds"] | record["ratios"], indent=1))


if __name__ == "__main__":
    main()
