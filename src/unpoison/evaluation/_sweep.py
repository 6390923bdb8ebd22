"""`sweep`: do what a plan asks for that is not in the store yet, and read the table; `choose_targets`.

A stage is ready when the artefacts that it reads are there. Ready stages are submitted to the executor in the
order of the plan, at most two for each worker at a time, so that Ctrl-C loses little. Stages that depend on a
failed one are given up; all others go on, and the same sweep tries the failed ones again.
"""

from __future__ import annotations

import heapq
import os
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from graphlib import TopologicalSorter
from pathlib import Path
from typing import final

from unpoison._artefacts import read_json, write_json
from unpoison.errors import InputError, UnpoisonError
from unpoison.evaluation._executors import Executor
from unpoison.evaluation._plan import Plan, controls
from unpoison.evaluation._results import Results
from unpoison.evaluation._schema import Experiment
from unpoison.evaluation._sections import TargetImage, Targets
from unpoison.evaluation._store import Outcome, Stage, Store, perform
from unpoison.threats import find_class


@final
@dataclass
class SweepProgress:
    """How far a sweep has come, with counts by kind of stage.

    Arguments:
        total: how many stages there are.
        cached: how many were in the store.
        done: how many were done now.
        running: how many have been submitted to the workers.
        failed: how many failed, or depend on one that did.
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
        """How many stages are neither done nor given up."""
        return self.total.total() - self.cached.total() - self.done.total() - self.failed.total()

    @property
    def seconds_left(self) -> float | None:
        """An estimate from what stages of the kind took so far; None before one is finished."""
        every = [value for values in self.seconds.values() for value in values]
        if not every:
            return None
        left = 0.0
        for kind, total in self.total.items():
            count = total - self.cached[kind] - self.done[kind] - self.failed[kind]
            left += count * statistics.fmean(self.seconds.get(kind) or every)
        return left / self.workers


Watcher = Callable[[SweepProgress, str], None]
"""Called after every event with the progress and one line that says what happened."""


def sweep(
    plan: Plan,
    store: str | os.PathLike[str],
    executor: Executor,
    *,
    watch: Watcher | None = None,
) -> Results:
    """Make what a plan asks for and a store lacks.

    Arguments:
        plan: from `plan`.
        store: a directory, made if need be. What it holds is not done again, whatever it was made for.
        executor: does the stages; it is left open.
        watch: called with the progress.

    Returns:
        The rows of all trials that succeeded, and the errors of the others.

    Raises:
        InputError: another process uses this store.

    Cost: beside the stages, reading every artefact once to check it, and a few milliseconds a stage.
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
        _Sweep(plan, found, executor, watch or _ignore).run()
        results = Results.read(root, plan.name)
        results.pack()
    return results


def choose_targets(
    experiment: Experiment,
    store: str | os.PathLike[str],
    executor: Executor,
    *,
    device: str = "cpu",
    watch: Watcher | None = None,
) -> Experiment:
    """The experiment with `targets.images` in place of `targets.pairs` and `targets.correct`.

    They are test images that clean networks predict correctly: an image that is predicted as another class
    without any poison says nothing about an attack. By default these networks are the controls of the
    experiment, so training them first costs nothing; but then the control "no attack" can only miss. With
    `targets.networks` they are others, and the control says how often a correctly predicted image is missed
    anyway. The recipes of the store stay as they are.

    Arguments:
        experiment: returned as it is where it has no `targets.correct`.
        store: where its clean networks are, or will be.
        executor: trains them.
        device: where.
        watch: called with the progress.

    Raises:
        InputError: as `plan`; or a class has too few images that all of them predict correctly.
        UnpoisonError: a clean network could not be trained.
    """
    targets = experiment.targets
    if targets is None or targets.correct is None:
        return experiment
    work, found = controls(experiment, device=device), Store(Path(store))
    with found.alone():
        _Sweep(work, found, executor, watch or _ignore).run()
    failures = found.errors(stage.key for stage in work.stages)
    if failures:
        raise UnpoisonError(f"targets.correct: a clean network could not be trained: {failures[0]}")
    answers = [
        read_json(found.place(stage.key) / "right.json") for stage in work.stages if stage.kind == "measure"
    ]
    names: list[str] = answers[0]["class_names"]
    images: list[TargetImage] = []
    for source, target in targets.pairs:
        label = find_class(source, names, option="targets.pairs")
        shared = sorted(set.intersection(*(set(each["right"][label]) for each in answers)))
        if len(shared) < targets.correct:
            raise InputError(
                f"targets.correct: all clean networks predict {len(shared)} test images of class {source!r} "
                f"correctly, fewer than {targets.correct}"
            )
        images += [
            TargetImage(test_index=(index,), target=target, source=source)
            for index in shared[: targets.correct]
        ]
    return replace(experiment, targets=Targets(images=tuple(images)))


class _Sweep:
    """The scheduler: which stages wait for what. Stages are numbered by their place in the plan."""

    def __init__(self, plan: Plan, store: Store, executor: Executor, watch: Watcher) -> None:
        self.store, self.executor, self.watch = store, executor, watch
        self.stages = plan.stages
        self.numbers = {stage.key: number for number, stage in enumerate(plan.stages)}
        self.progress = SweepProgress(workers=executor.workers)
        self.progress.total.update(stage.kind for stage in plan.stages)
        self.sorter: TopologicalSorter[int] = TopologicalSorter()
        self.ready: list[int] = []  # a heap
        self.open: dict[int, Stage] = {}  # neither done nor given up

    def run(self) -> None:
        sound = {stage.key for stage in self.stages if self._is_sound(stage)}
        for number, stage in enumerate(self.stages):
            if stage.key not in sound:
                self.open[number] = stage
                missing = [self.numbers[key] for key in stage.inputs.values() if key not in sound]
                self.sorter.add(number, *missing)
        self.watch(
            self.progress,
            f"{self.progress.open} of {len(self.stages)} stages to do, {len(sound)} in the store",
        )
        self.sorter.prepare()
        self._queue()
        running = 0
        while self.ready or running:
            while self.ready and running < 2 * self.executor.workers:
                stage = self.stages[heapq.heappop(self.ready)]
                # A worker may have a working directory of its own.
                self.executor.submit(stage.key, perform, str(self.store.root.absolute()), stage)
                self.progress.running[stage.kind] += 1
                running += 1
            for done in self.executor.wait():
                running -= 1
                self._finish(done.value if done.error is None else Outcome(done.key, error=done.error))

    def _queue(self) -> None:
        """Put the stages that wait for nothing any more into the heap."""
        for number in self.sorter.get_ready():
            heapq.heappush(self.ready, number)

    def _is_sound(self, stage: Stage) -> bool:
        state = self.store.state(stage.key)
        if state == "damaged":
            self.progress.damaged[stage.kind] += 1
            self.watch(self.progress, f"{_name(stage)}: its artefact is damaged and is made again")
        elif state == "sound":
            self.progress.cached[stage.kind] += 1
        return state == "sound"

    def _finish(self, outcome: Outcome) -> None:
        number = self.numbers[outcome.key]
        stage = self.stages[number]
        self.progress.running[stage.kind] -= 1
        if outcome.error is not None:
            self._give_up(number)
            if not self.store.failed(stage.key).exists():  # the worker died before it could write
                self.store.fail(stage, outcome.error)
            self.watch(self.progress, f"{_name(stage)}: failed: {outcome.error}")
            return
        del self.open[number]
        self.progress.done[stage.kind] += 1
        self.progress.seconds[stage.kind].append(outcome.seconds)
        self.sorter.done(number)
        self._queue()
        self.watch(self.progress, f"{_name(stage)}: done in {outcome.seconds:.2f} s")

    def _give_up(self, failed: int) -> None:
        """Count the failed stage, and all that depend on it."""
        lost: set[str] = set()
        for number, stage in list(self.open.items()):
            if number == failed or not lost.isdisjoint(stage.inputs.values()):
                lost.add(stage.key)
                del self.open[number]
                self.progress.failed[stage.kind] += 1


def _name(stage: Stage) -> str:
    return f"{stage.kind} {stage.key[:8]}"


def _ignore(progress: SweepProgress, line: str) -> None:
    pass
