"""`unpoison report`: run directories in, one page out."""

from __future__ import annotations

from pathlib import Path

from unpoison import report as report_room
from unpoison.cli._console import Console
from unpoison.cli._interrupts import Interrupts
from unpoison.cli._options import Report
from unpoison.cli._session import session
from unpoison.errors import InputError

PAGE = "report.html"


def report(options: Report, console: Console, interrupts: Interrupts) -> int:
    """Write the page, alone when `--out` is a .html file, else into a run directory."""
    if not options.runs:
        raise InputError("report: name at least one run directory; see unpoison report --help")
    alone = options.out.suffix.lower() in (".html", ".htm")
    if alone and options.out.is_dir():
        raise InputError(f"--out {options.out}: is a directory")
    with session(options, None if alone else options.out, console, interrupts) as run:
        page = options.out if alone else run.artefact("report", PAGE)
        with run.stage("report"):
            report_room.write_report(page, options.runs)
        run.results.update(runs=[str(path) for path in options.runs], bytes=page.stat().st_size)
        if alone:
            run.recorder.artefacts["report"] = options.out.name
    console.show(f"the report is {options.out if alone else options.out / Path(PAGE)}")
    return 0
