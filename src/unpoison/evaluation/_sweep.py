"""`sweep`: do what a plan asks for that is not in the store yet, and read the table.

A stage is ready when the artefacts that it reads are there. Ready stages go to the executor in the order of
the plan, never more at a time than its workers can begin soon, so that Ctrl-C loses little. A stage that
fails takes with it those that depend on it; all others go on, and the same sweep given again tries the
failed ones again.
"""

from __future__ import annotations

import heapq
import os
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

from unpoison._artefacts import read_json, write_json
from unpoison.evaluation._executors import Executor
from unpoison.evaluation._plan import Plan
from unpoison.evaluation._results import Results
from unpoison.evaluation._store import Outcome, Stage, Store


@final
@dataclass
class Standing:
    """How far a sweep has come, by kind of stage.

    Arguments:
        total: how many stages there are.
        cached: how many were in the store.
        done: how many were done now.
        running: how many are with the workers.
        failed: how many went wrong, or wait for one that did.
        damaged: how many artefacts were found damaged, and are made again.
        seconds: what each finished stage took.
        workers: how many stages are done at a time.
    """

    total: Counter[str] = field(default_factory=Counter)
    cached: Counter[str] = field(default_factory=Counter)
    done: Counter[str] = field(default_factory=Counter)
    running: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    damaged: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    workers: int = 1

    @property
    def open(self) -> int:
        """How many stages are neither there nor given up."""
        return self.total.total() - self.cached.total() - self.done.total() - self.failed.total()

    @property
    def seconds_left(self) -> float | None:
        """A guess from what stages of the kind took so far; None before there is anything to guess from."""
        every = [value for values in self.seconds.values() for value in values]
        if not every:
            return None
        left = 0.0
        for kind, total in self.total.items():
            count = total - self.cached[kind] - self.done[kind] - self.failed[kind]
            left += count * statistics.fmean(self.seconds.get(kind) or every)
        return left / self.workers


Watcher = Callable[[Standing, str], None]
"""Told the standing after everything that happens, and what happened in one line."""


def sweep(
    plan: Plan,
    store: str | os.PathLike[str],
    executor: Executor,
    *,
    watch: Watcher | None = None,
) -> Results:
    """Bring a store up to a plan.

    Arguments:
        plan: from `plan`.
        store: a directory, made if need be. What it holds already is not done again, by whomever it was made.
        executor: who does the stages; it is left open.
        watch: told how far it has come.

    Returns:
        The rows of all trials that went well, and what went wrong in the others.

    Raises:
        InputError: another process is at work in this store.

    Cost: beside the stages, reading every artefact once to know that it is sound, and a few milliseconds a
    stage.
    """
    root = Path(store)
    found = Store(root)
    with found.alone():
        write_json(
            root / "recipes" / f"{plan.name}.json",
            {
                "experiment": dict(plan.experiment),
                "rows": list(plan.rows),
                "stages": [stage.key for stage in plan.stages],
            },
        )
        _Sweep(plan, found, executor, watch or _nobody).run()
        results = Results.read(root, plan.name)
        results.pack()
    return results


def make(plan: Plan, store: Store, executor: Executor, *, watch: Watcher | None = None) -> tuple[str, ...]:
    """Make the artefacts of a plan without trials, beside what recipes the store holds.

    Returns:
        What went wrong, a line each.

    Raises:
        InputError: another process is at work in this store.
    """
    with store.alone():
        _Sweep(plan, store, executor, watch or _nobody).run()
    failed = [store.failed(stage.key) for stage in plan.stages]
    return tuple(read_json(path)["error"] for path in failed if path.exists())


class _Sweep:
    """The scheduler: which stages wait for what."""

    def __init__(self, plan: Plan, store: Store, executor: Executor, watch: Watcher) -> None:
        self.plan, self.store, self.executor, self.watch = plan, store, executor, watch
        self.stages = {stage.key: stage for stage in plan.stages}
        self.standing = Standing(workers=executor.workers)
        self.standing.total.update(stage.kind for stage in plan.stages)
        self.readers: Mapping[str, list[str]] = defaultdict(list)
        self.missing: dict[str, set[str]] = {}
        self.ready: list[tuple[int, str]] = []  # a heap, by place in the plan
        self.order = {key: place for place, key in enumerate(self.stages)}
        self.given_up: set[str] = set()

    def run(self) -> None:
        sound = {key for key in self.stages if self._is_sound(key)}
        for key, stage in self.stages.items():
            if key in sound:
                continue
            self.missing[key] = {one for one in stage.inputs.values() if one not in sound}
            for one in self.missing[key]:
                self.readers[one].append(key)
            if not self.missing[key]:
                heapq.heappush(self.ready, (self.order[key], key))
        self.watch(
            self.standing,
            f"{self.standing.open} of {len(self.stages)} stages to do, {len(sound)} in the store",
        )
        running = 0
        while self.ready or running:
            while self.ready and running < 2 * self.executor.workers:
                stage = self.stages[heapq.heappop(self.ready)[1]]
                self.executor.submit(self.store.root, stage)
                self.standing.running[stage.kind] += 1
                running += 1
            for outcome in self.executor.wait():
                running -= 1
                self._finish(outcome)

    def _is_sound(self, key: str) -> bool:
        stage, state = self.stages[key], self.store.state(key)
        if state == "damaged":
            self.standing.damaged[stage.kind] += 1
            self.watch(self.standing, f"{_name(stage)}: its artefact is damaged and is made again")
        elif state == "sound":
            self.standing.cached[stage.kind] += 1
        return state == "sound"

    def _finish(self, outcome: Outcome) -> None:
        stage = self.stages[outcome.key]
        self.standing.running[stage.kind] -= 1
        if outcome.error is not None:
            lost = self._give_up(stage.key)
            self.standing.failed.update(self.stages[key].kind for key in lost)
            if not self.store.failed(stage.key).exists():  # the worker died and could not tell
                record = {"key": stage.key, **stage.identity, "error": outcome.error, "traceback": ""}
                write_json(self.store.failed(stage.key), record)
            self.watch(self.standing, f"{_name(stage)}: failed: {outcome.error}")
            return
        self.standing.done[stage.kind] += 1
        self.standing.seconds[stage.kind].append(outcome.seconds)
        for key in self.readers[stage.key]:
            self.missing[key].discard(stage.key)
            if not self.missing[key]:
                heapq.heappush(self.ready, (self.order[key], key))
        self.watch(self.standing, f"{_name(stage)}: done in {outcome.seconds:.2f} s")

    def _give_up(self, key: str) -> set[str]:
        """The failed stage and all that wait for it."""
        lost, fresh = {key}, [key]
        while fresh:
            for reader in self.readers[fresh.pop()]:
                if reader not in lost:
                    lost.add(reader)
                    fresh.append(reader)
        # One that waits for two failed stages is counted once.
        new = lost - self.given_up
        self.given_up |= new
        return new


def _name(stage: Stage) -> str:
    return f"{stage.kind} {stage.key[:8]}"


def _nobody(standing: Standing, line: str) -> None:
    pass
