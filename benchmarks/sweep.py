"""What a sweep costs beside its stages.

    python -m benchmarks.sweep [--json]

- overhead: 1,000 trials whose stages do nothing (a poison and a victim that all share, a find and a measure
  stage a trial), on one worker; seconds a trial, and again with everything in the store;
- leaderboard: reading a store of 10,000 trials and writing the page;
- workers: the same 16 stages of equal, single-threaded arithmetic with one worker and with two. There is no
  peer; `ratios` holds the seconds of one worker over those of two.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks._harness import Bench, Timed, main, timed
from unpoison.evaluation import LocalExecutor, Plan, Results, Stage, sweep, write_row
from unpoison.evaluation._results import ROW

STAGE = "benchmarks.sweep:"
WORKERS = "16 equal stages"
Values = Mapping[str, Any]


def empty(configuration: Values, inputs: Mapping[str, Path], surroundings: Values, out: Path) -> None:
    """A stage of no work; a measure stage writes a row as large as a real one."""
    if configuration["row"] is None:
        (out / "nothing").touch()
    else:
        write_row(out, configuration["row"], {"seconds_find": 0.0, "peak_bytes": 0.0})


def busy(configuration: Values, inputs: Mapping[str, Path], surroundings: Values, out: Path) -> None:
    """A fixed amount of single-threaded matrix products."""
    torch.set_num_threads(1)
    matrix = torch.full((384, 384), 1e-3)
    for _ in range(surroundings["products"]):
        matrix = torch.tanh(matrix @ matrix)
    (out / "nothing").touch()


def row(trial: int) -> dict[str, Any]:
    """A row of one of ten methods, every column filled."""
    filled = {"string": "a name", "int64": 50, "double": 0.5, "bool": True}
    filled |= {
        "list<item: string>": [f"class {label}" for label in range(10)],
        "list<item: int64>": [50] * 10,
    }
    values = {column.name: filled[str(column.type)] for column in ROW}
    control = "" if trial % 10 else "random filter"
    return {**values, "seed": trial // 10, "detector": f"method {trial % 10}", "control": control}


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


def swept(plan: Plan, store: Path, workers: int) -> float:
    """Seconds of a sweep, without those that the workers take to start and to import torch."""
    warm = [Stage("craft", f"{STAGE}busy", {"warm": n}, {}, {"products": 200}) for n in range(4 * workers)]
    with LocalExecutor(workers) as executor:
        sweep(Plan("warm", {}, tuple(warm), ()), store / "warm", executor)
        return timed(lambda: sweep(plan, store / "store", executor))[0]


def reading(rows: int, folder: Path) -> dict[str, float]:
    """Seconds from a store of so many trials to its leaderboard."""
    import pyarrow as pa

    from unpoison._artefacts import write_json
    from unpoison.evaluation._results import _KEYED
    from unpoison.report import leaderboard_html

    plan = plan_of(rows)
    stages = [stage.key for stage in plan.stages]
    summary = {"experiment": dict(plan.experiment), "rows": list(plan.rows), "stages": stages}
    write_json(folder / "recipes" / "empty.json", summary)
    blank = dict.fromkeys(_KEYED.names)
    table = pa.Table.from_pylist(
        [{**blank, **row(trial), "key": key} for trial, key in enumerate(plan.rows)], schema=_KEYED
    )
    Results("empty", table, rows, (), folder, {}).pack()
    read, results = timed(lambda: Results.read(folder))
    written, _ = timed(lambda: leaderboard_html(results))
    assert len(results.table) == rows
    return {"reading the store": read, "reading it and writing the leaderboard": read + written}


def measure(bench: Bench) -> None:
    """Overhead, leaderboard, workers."""
    trials, rows, products = (20, 100, 10) if bench.options.quick else (1000, 10_000, 250)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = plan_of(trials)
        for what in ("a trial without work", "a trial without work, from the store"):
            bench.seconds[what] = swept(plan, folder / "overhead", 1) / trials
        bench.seconds |= reading(rows, folder / "board")
        busy_stages = tuple(
            Stage("train", f"{STAGE}busy", {"stage": n}, {}, {"products": products}) for n in range(16)
        )
        plan, fresh = Plan("busy", {}, busy_stages, ()), itertools.count()
        bench.compare(
            WORKERS,
            {
                name: lambda count=count: Timed(swept(plan, folder / f"scaling {next(fresh)}", count))
                for name, count in (("two workers", 2), ("one worker", 1))
            },
            warm=True,
        )
    bench.peak_bytes.clear()  # of the workers, which are other processes


if __name__ == "__main__":
    main(measure, threads=1)
