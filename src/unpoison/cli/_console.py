"""What the command says while it works: bars on a terminal, plain lines elsewhere, always on standard error.

Standard output carries results alone, so that `--json` can be piped.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, final

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

_SECONDS_BETWEEN_LINES = 5.0


class Progress(Protocol):
    """Called with how much is done so far, a few words about it, and how much there is if that changes."""

    def __call__(self, done: float, words: str = "", total: float | None = None) -> None:
        """Show it."""


@final
@dataclass(frozen=True)
class Console:
    """Where the command's words go.

    Arguments:
        results: print summaries on standard output; False under `--json`, where it carries the record alone.
        since: when the command began, by `time.perf_counter`.
    """

    results: bool = True
    since: float = field(default_factory=time.perf_counter)
    _cache: dict[str, Any] = field(default_factory=dict, repr=False)

    def say(self, text: str) -> None:
        """One line for the person who waits, on standard error."""
        self._error.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, *renderables: object) -> None:
        """A summary, on standard output."""
        if self.results:
            from rich.console import Console as RichConsole

            # Tables keep their width in a file or a pipe; on a terminal they take what there is.
            output = RichConsole(file=sys.stdout, width=None if sys.stdout.isatty() else 100)
            output.print(*renderables, sep="\n", markup=False, highlight=False, soft_wrap=False)

    @contextlib.contextmanager
    def progress(self, what: str, total: float | None, unit: str) -> Iterator[Progress]:
        """Show how far the block has come: a bar on a terminal, elsewhere a line now and then.

        A `total` of None means that nobody knows how long it takes.
        """
        if self._error.is_terminal:
            with self._bar(what, total, unit) as step:
                yield step
        else:
            with self._lines(what, total, unit) as step:
                yield step

    @contextlib.contextmanager
    def _bar(self, what: str, total: float | None, unit: str) -> Iterator[Progress]:
        from rich import progress as rich

        columns = (
            rich.TextColumn("{task.description}", markup=False),
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            rich.TextColumn(unit),
            rich.TimeElapsedColumn(),
            rich.TextColumn("{task.fields[words]}", markup=False),
        )
        # Redirection would send what others print on standard output into the bar's own stream.
        bar = rich.Progress(*columns, console=self._error, redirect_stdout=False, redirect_stderr=False)
        with bar:
            task = bar.add_task(what, total=total, words="")

            def step(done: float, words: str = "", total: float | None = None) -> None:
                bar.update(task, total=total, completed=done, words=words)

            yield step
            if (end := bar.tasks[0].total) is not None:
                bar.update(task, completed=end)

    @contextlib.contextmanager
    def _lines(self, what: str, total: float | None, unit: str) -> Iterator[Progress]:
        started = last = time.monotonic()
        self.say(f"{what} ...")

        def step(done: float, words: str = "", total: float | None = total) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= _SECONDS_BETWEEN_LINES:
                last = now
                of = f" of {total:g}" if total is not None else ""
                self.say(f"{what}: {done:g}{of} {unit}, {now - started:.0f} s{', ' + words if words else ''}")

        yield step
        self.say(f"{what}: done in {time.monotonic() - started:.1f} s")

    @property
    def _error(self) -> RichConsole:
        from rich.console import Console as RichConsole

        # Made anew when standard error is another one, as it is from test to test.
        if self._cache.get("file") is not sys.stderr:
            self._cache.update(file=sys.stderr, console=RichConsole(file=sys.stderr))
        console: RichConsole = self._cache["console"]
        return console
