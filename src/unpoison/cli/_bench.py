"""`unpoison bench`: a recipe in, a store of trials and a leaderboard out.

Unlike the other verbs it writes into `--out` as it goes: a store that holds half of a recipe is what the same
command goes on from, after Ctrl-C, a crash or `kill -9`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from unpoison._artefacts import write_json
from unpoison.cli._console import Console
from unpoison.cli._executors import check_place, ray_executor
from unpoison.cli._interrupts import Interrupts, Terminated
from unpoison.cli._options import Bench, configuration
from unpoison.cli._session import device_named
from unpoison.cli._status import stopped
from unpoison.errors import InputError, UnpoisonError
from unpoison.evaluation import (
    Executor,
    Experiment,
    LocalExecutor,
    Results,
    SweepProgress,
    leaderboard,
)
from unpoison.runs import Recorder, RunRecord

if TYPE_CHECKING:
    from rich.table import Table

_SECONDS_BETWEEN_LINES = 10.0
LOG = "bench.log"
FAILED = 1
_KINDS = ("craft", "train", "calibrate", "find", "screen", "heal", "measure")


@final
class _NoTargetsError(UnpoisonError):
    """A stage failed by which targets are chosen: no bad input, and no trial can be done."""


def bench(options: Bench, console: Console, interrupts: Interrupts) -> int:
    """Do what the recipe asks for that the store does not have, and write its leaderboard; 1 if some
    failed."""
    experiment = _experiment(options)
    out = options.out
    if out.exists() and not (out.is_dir() and ((out / "recipes").is_dir() or not any(out.iterdir()))):
        raise InputError(f"--out {out}: is neither empty nor a store of results; name another directory")
    recorder = Recorder("bench", configuration(options), options.run.seed, console.since)
    try:
        results, progress = _sweep(options, experiment, recorder, console)
    except _NoTargetsError as error:
        console.say(f"unpoison: error: {error}; {out / LOG} has more, and the same command tries again")
        return FAILED
    except (KeyboardInterrupt, Terminated) as end:
        return stopped(end, out, console)
    with recorder.stage("leaderboard"):
        _write(results, recorder, out)
    missing = results.planned - len(results.table)
    recorder.results.update(
        recipe=experiment.name,
        trials=len(results.table),
        planned=results.planned,
        failures=list(results.failures),
        table=results.fingerprint,
        stages={name: getattr(progress, name).total() for name in ("cached", "done", "failed", "damaged")},
    )
    record = recorder.record()
    record.save(out)
    write_json(out / f"{experiment.name}.json", kept(results, record))
    if options.run.json:
        print(json.dumps(record.to_dict(), indent=2, allow_nan=False))  # noqa: T201
    _show(results, console, out)
    return FAILED if missing else 0


def kept(results: Results, record: RunRecord) -> dict[str, Any]:
    """What a recipe gave, with date and machine, to be kept beside it."""
    machine = {"type": record.device["type"], "cores": os.cpu_count()}
    return {
        "recipe": results.name,
        "date": record.started[:10],
        "machine": machine,
        "versions": dict(record.versions),
        "experiment": results.experiment,
        "trials": len(results.table),
        "planned": results.planned,
        "failures": list(results.failures),
        "table": results.fingerprint,
        "seconds": record.seconds["total"],
        "lines": [line.to_dict() for line in leaderboard(results)],
    }


def _experiment(options: Bench) -> Experiment:
    experiment = Experiment.read(options.recipe)
    if options.run.seed:
        raise InputError("--seed: the seeds of a sweep are in its recipe; leave it out")
    if options.run.overwrite:
        raise InputError("--overwrite: a store is continued, never replaced; name another one with --out")
    check_place(options.place)
    if options.run.threads is not None:
        return dataclasses.replace(experiment, threads=options.run.threads)
    return experiment


def _sweep(
    options: Bench, experiment: Experiment, recorder: Recorder, console: Console
) -> tuple[Results, SweepProgress]:
    with recorder.stage("start"):
        from unpoison.evaluation import choose_targets, plan, sweep

        device = device_named(options.run.device).type
    with recorder.stage("plan"):
        if device == "cuda" and options.place.executor == "ray" and not options.place.gpu_share:
            raise InputError(
                "--gpu-share: give the share of a GPU that each stage needs, above 0 and at most 1"
            )
        work = None if experiment.chooses_targets else plan(experiment, device=device)
    progress = SweepProgress()
    with _executor(options, experiment.threads) as executor:
        log = options.out / LOG
        if work is None:
            what = f"{experiment.name}: clean networks, by which targets are chosen"
            with recorder.stage("targets"), _view(console, log, what) as show:
                try:
                    experiment = choose_targets(experiment, options.out, executor, device=device, watch=show)
                except InputError:
                    raise
                except UnpoisonError as error:
                    raise _NoTargetsError(str(error)) from error
            work = plan(experiment, device=device)
        what = f"{experiment.name}: {len(work.rows)} trials"
        with recorder.stage("sweep"), _view(console, log, what) as show:

            def watch(now: SweepProgress, line: str) -> None:
                nonlocal progress
                progress = now
                show(now, line)

            results = sweep(work, options.out, executor, watch=watch)
    return results, progress


def _executor(options: Bench, threads: int) -> Executor:
    on_ray = ray_executor(options.place, options.workers, threads)
    return LocalExecutor(options.workers, threads=threads) if on_ray is None else on_ray


def _write(results: Results, recorder: Recorder, out: Path) -> None:
    from unpoison.report import write_leaderboard

    for suffix in ("html", "md", "tex"):
        place = f"{results.name}.{suffix}"
        write_leaderboard(out / place, results)
        recorder.artefacts[suffix] = place
    recorder.artefacts.update(record=f"{results.name}.json", rows=f"tables/{results.name}.parquet", log=LOG)


@contextlib.contextmanager
def _view(console: Console, log: Path, what: str) -> Iterator[Any]:
    """Yield a `Watcher`: a table that lives on a terminal, a line now and then elsewhere, all lines in the
    log."""
    from rich.console import Console as RichConsole
    from rich.live import Live

    log.parent.mkdir(parents=True, exist_ok=True)
    screen = RichConsole(stderr=True)
    started = last = time.monotonic()
    with open(log, "a", encoding="utf-8") as lines, contextlib.ExitStack() as stack:
        now: tuple[SweepProgress, str] = (SweepProgress(), "looking at what the store has")
        if screen.is_terminal:
            live = Live(
                get_renderable=lambda: _table(what, *now, time.monotonic() - started),
                console=screen,
                refresh_per_second=4,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            stack.enter_context(live)
        else:
            console.say(f"{what} ...")

        def watch(progress: SweepProgress, line: str) -> None:
            nonlocal last, now
            now = progress, line
            stamp = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
            lines.write(f"{stamp} {line}\n")
            lines.flush()
            if screen.is_terminal:
                return
            if time.monotonic() - last >= _SECONDS_BETWEEN_LINES or "failed" in line or "damaged" in line:
                last = time.monotonic()
                console.say(f"{what}: {_words(progress)}; {line}")

        yield watch
        if not screen.is_terminal:
            console.say(f"{what}: done in {time.monotonic() - started:.1f} s")


def _words(progress: SweepProgress) -> str:
    there = progress.cached.total() + progress.done.total()
    left = progress.seconds_left
    return f"{there} of {progress.total.total()} stages, {progress.running.total()} with workers" + (
        f", about {left:.0f} s left" if left else ""
    )


def _table(what: str, progress: SweepProgress, line: str, seconds: float) -> Table:
    from rich import box
    from rich.table import Table

    left = progress.seconds_left
    table = Table(
        box=box.SIMPLE_HEAD,
        title=what,
        title_justify="left",
        caption=f"{seconds:.0f} s, " + ("" if left is None else f"about {left:.0f} s left, ") + line,
        caption_justify="left",
    )
    for heading in ("stage", "all", "cached", "done", "running", "failed"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for kind, total in sorted(progress.total.items(), key=lambda one: _KINDS.index(one[0])):
        counts = (progress.cached, progress.done, progress.running, progress.failed)
        table.add_row(kind, str(total), *(str(count[kind] or "") for count in counts))
    return table


def _show(results: Results, console: Console, out: Path) -> None:
    from rich import box
    from rich.table import Table

    from unpoison.report import table_of

    table = Table(box=box.SIMPLE_HEAD)
    shown = table_of(leaderboard(results)).select(
        "Method", "Attack", "Attack success", "Clean accuracy", "Recall", "Trials"
    )
    for column in shown.columns:
        table.add_column(column.name.lower(), justify="right" if column.group else "left")
    for row in shown.rows:
        table.add_row(*(cell.text for cell in row))
    words = [
        f"{len(results.table)} of {results.planned} trials; the table's digest is {results.fingerprint}."
    ]
    words += [f"failed: {failure}" for failure in results.failures[:5]]
    console.show(table, *words, f"Open {out / (results.name + '.html')} to see them all.")
