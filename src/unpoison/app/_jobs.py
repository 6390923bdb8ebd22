"""`Jobs`: long work, each in a process of its own, one after another.

A job is a call of the command, `python -m unpoison trace ...`, which writes a run directory whole or not at
all: what the page does can be repeated by hand, and a cancelled job leaves nothing behind. Its progress comes
as JSON lines on its standard error. Jobs belong to the server and not to a window, so that a page that is
loaded again shows them as they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shlex
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, final

State = Literal["waiting", "running", "done", "failed", "cancelled"]
_PATIENCE = 10.0


@final
@dataclass(eq=False, kw_only=True)
class Job:
    """One call of the command.

    Arguments:
        number: counted from 1.
        title: what is done, for people.
        words: the arguments of `unpoison`.
        out: the run directory, or the file, that it writes.
        about: what it is about, such as the input that is traced.
    """

    number: int
    title: str
    words: tuple[str, ...]
    out: Path
    about: str = ""
    state: State = "waiting"
    stage: str = ""
    done: int = 0
    total: int = 0
    message: str = ""
    began: float | None = None
    ended: float | None = None
    process: asyncio.subprocess.Process | None = field(default=None, repr=False)

    @property
    def open(self) -> bool:
        """Whether it is still to be done, or being done."""
        return self.state in ("waiting", "running")

    @property
    def writes(self) -> Literal["run", "file", "folder"]:
        """What `out` is: a run directory, a file, or a folder of exported files."""
        if self.words[0] not in ("export", "report"):
            return "run"
        return "file" if self.out.suffix else "folder"

    @property
    def command(self) -> str:
        """How to do the same in a shell."""
        return shlex.join(("unpoison", *self.words))

    @property
    def seconds(self) -> float:
        """How long it has run."""
        if self.began is None:
            return 0.0
        return (time.monotonic() if self.ended is None else self.ended) - self.began

    @property
    def share(self) -> float | None:
        """How much of the present stage is done, in [0, 1]; None where that is not known."""
        return self.done / self.total if self.total else None


@final
class Jobs:
    """The jobs of one server.

    Arguments:
        changed: called after each change of a job.
        finished: called with each job that has ended.
    """

    def __init__(self, changed: Callable[[], None], finished: Callable[[Job], None]) -> None:
        self.all: list[Job] = []
        self._changed, self._finished = changed, finished
        self._waiting: deque[Job] = deque()
        self._task: asyncio.Task[None] | None = None

    @property
    def current(self) -> Job | None:
        """The one that runs."""
        return next((job for job in self.all if job.state == "running"), None)

    def start(self, title: str, words: Sequence[str], out: Path, about: str = "") -> Job:
        """Do a job when those before it are done. Called where an event loop runs."""
        job = Job(number=len(self.all) + 1, title=title, words=tuple(words), out=out, about=about)
        self.all.append(job)
        self._waiting.append(job)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._work())
        self._changed()
        return job

    def cancel(self, job: Job) -> None:
        """End a job; it leaves nothing behind."""
        if job.state == "waiting":
            job.state = "cancelled"
            self._waiting.remove(job)
            self._changed()
        elif job.state == "running" and job.process is not None:
            job.message = "cancelled"
            with contextlib.suppress(ProcessLookupError):
                job.process.send_signal(signal.SIGTERM)

    async def close(self) -> None:
        """End everything, when the server ends."""
        for job in self.all:
            self.cancel(job)
        if self._task is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._task), _PATIENCE)
        for job in self.all:
            if job.process is not None and job.process.returncode is None:
                job.process.kill()

    async def _work(self) -> None:
        while self._waiting:
            job = self._waiting.popleft()
            job.state, job.began = "running", time.monotonic()
            self._changed()
            try:
                status = await self._run(job)
            except OSError as error:
                status, job.message = 1, str(error)
            job.ended = time.monotonic()
            if job.message == "cancelled" and status != 0:
                job.state = "cancelled"
            else:
                job.state = "done" if status == 0 else "failed"
                if status < 0:
                    job.message = f"was ended from outside (signal {-status}), perhaps for want of memory"
            self._finished(job)
            self._changed()

    async def _run(self, job: Job) -> int:
        job.process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "unpoison", *job.words, "--progress", "json"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            limit=1 << 20,
        )
        assert job.process.stderr is not None
        async for line in job.process.stderr:
            self._read(job, line.decode(errors="replace").strip())
        return await job.process.wait()

    def _read(self, job: Job, line: str) -> None:
        if not line or job.message == "cancelled":
            return
        try:
            told = json.loads(line)
            job.stage, job.done, job.total = str(told["stage"]), int(told["done"]), int(told["total"])
        except (ValueError, KeyError, TypeError):
            job.message = line.removeprefix("unpoison: error: ")[:500]
        self._changed()
