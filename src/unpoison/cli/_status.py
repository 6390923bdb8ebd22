"""The exit statuses of the command, which pipelines may rely on; docs/command.md has the table.

| status | meaning |
|---|---|
| 0 | done; under `--fail-on-findings` also: no poison was found |
| 1 | `--fail-on-findings` and poison was found; `repair` could not; `bench` could not do all trials |
| 2 | bad input: one line on standard error says what, where and what to do |
| 70 | a bug in unpoison, with the traceback that we need to mend it |
| 130, 143 | stopped by Ctrl-C, by SIGTERM; nothing was written, but what `bench` and `index` go on from |
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from unpoison.cli._console import Console
from unpoison.cli._interrupts import Terminated

if TYPE_CHECKING:
    from unpoison.cli._options import Export, Scan, Trace
    from unpoison.detectors import Findings

DONE: Final = 0
FOUND: Final = 1
BAD_INPUT: Final = 2
BUG: Final = 70
INTERRUPTED: Final = 130
TERMINATED: Final = 143


def status_of(options: Trace | Scan | Export, findings: Findings) -> int:
    """Whether `--fail-on-findings` was given and poison was found."""
    return FOUND if options.fail_on_findings and findings.poison_found else DONE


def stopped(end: BaseException, place: Path, console: Console) -> int:
    """Say that a verb was stopped that goes on from what it has done."""
    console.say(f"unpoison: stopped; {place} keeps what is done, and the same command goes on from there")
    return TERMINATED if isinstance(end, Terminated) else INTERRUPTED
