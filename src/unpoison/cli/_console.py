"""What the command prints while it works: bars on a terminal, plain lines elsewhere.

All of it goes to standard error; standard output carries results alone, so that `--json` can be piped.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

from unpoison._progress import Progress
from unpoison.errors import printable

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_BETWEEN_OBJECTS = 0.1


@final
@dataclass(frozen=True)
class Console:
    """Where the command's words go.

    Arguments:
        results: print summaries on standard output; False under `--json`, where it carries the record alone.
        since: when the command began, by `time.perf_counter`.
        as_json: tell progress as JSON lines, for a program that reads them.
    """

    results: bool = True
    since: float = field(default_factory=time.perf_counter)
    as_json: bool = False
    _cache: dict[str, Any] = field(default_factory=dict, repr=False)

    def say(self, text: str) -> None:
        """One line for the person who waits, on standard error."""
        self._error.print(_lines_of(text), markup=False, highlight=False, soft_wrap=True)

    def show(self, *renderables: object) -> None:
        """A summary, on standard output."""
        if self.results:
            from rich.console import Console as RichConsole

            # Tables keep their width in a file or a pipe; on a terminal they take what there is.
            output = RichConsole(file=sys.stdout, width=None if sys.stdout.isatty() else 100)
            shown = [_lines_of(one) if isinstance(one, str) else one for one in renderables]
            output.print(*shown, sep="\n", markup=False, highlight=False, soft_wrap=False)

    @contextlib.contextmanager
    def progress(self, what: str) -> Iterator[Progress]:
        """Yield a `Progress` that shows how far `what` has come.

        A bar on a terminal, a line now and then elsewhere; or JSON lines.
        """
        if self.as_json:
            yield _json_lines(what)
            return
        with self._bar(what) if self._error.is_terminal else self._lines(what) as report:
            yield report

    @contextlib.contextmanager
    def _bar(self, what: str) -> Iterator[Progress]:
        from rich import progress as rich

        columns = (
            rich.TextColumn("{task.description}", markup=False),
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            rich.TimeElapsedColumn(),
            rich.TextColumn("{task.fields[metrics]}", markup=False),
        )
        # Redirection would send what others print on standard output into the bar's own stream.
        bar = rich.Progress(*columns, console=self._error, redirect_stdout=False, redirect_stderr=False)
        with bar:
            task = bar.add_task(what, total=None, metrics="")

            def report(stage: str, done: int, total: int, /, **metrics: float) -> None:
                bar.update(
                    task,
                    description=f"{what}: {stage}",
                    total=total,
                    completed=done,
                    metrics=_shown(metrics),
                )

            yield report
            if (end := bar.tasks[0].total) is not None:
                bar.update(task, completed=end)

    @contextlib.contextmanager
    def _lines(self, what: str) -> Iterator[Progress]:
        started = last = time.monotonic()
        self.say(f"{what} ...")

        def report(stage: str, done: int, total: int, /, **metrics: float) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= _SECONDS_BETWEEN_LINES:
                last = now
                numbers = f", {_shown(metrics)}" if metrics else ""
                self.say(f"{what}: {stage}, {done} of {total}, {now - started:.0f} s{numbers}")

        yield report
        self.say(f"{what}: done in {time.monotonic() - started:.1f} s")

    @property
    def _error(self) -> RichConsole:
        from rich.console import Console as RichConsole

        # Made anew when standard error is another one, as it is from test to test.
        if self._cache.get("file") is not sys.stderr:
            self._cache.update(file=sys.stderr, console=RichConsole(file=sys.stderr))
        console: RichConsole = self._cache["console"]
        return console


def _lines_of(text: str) -> str:
    """Text without control and format characters but ends of lines."""
    return "\n".join(map(printable, text.split("\n")))


def _json_lines(what: str) -> Progress:
    """Writes {"what", "stage", "done", "total"} and the metrics, at most ten times a second and stage."""
    last, told = 0.0, ""

    def report(stage: str, done: int, total: int, /, **metrics: float) -> None:
        nonlocal last, told
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_OBJECTS or stage != told or done >= total:
            last, told = now, stage
            finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
            line = json.dumps({"what": what, "stage": stage, "done": done, "total": total, **finite})
            print(line, file=sys.stderr, flush=True)  # noqa: T201

    return report


def _shown(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())


def per_cent(rate: float | None) -> str:
    """A rate for people.

    >>> per_cent(0.915), per_cent(None), per_cent(float("nan"))
    ('91.5 %', '-', '-')
    """
    return "-" if rate is None or math.isnan(rate) else f"{100 * rate:.1f} %"
