"""`unpoison report`: run directories in, one page out; a store of results in, its leaderboard out."""

from __future__ import annotations

from pathlib import Path

from unpoison import report as report_room
from unpoison.cli._console import Console
from unpoison.cli._interrupts import Interrupts
from unpoison.cli._options import Report
from unpoison.cli._session import session
from unpoison.cli._status import DONE
from unpoison.errors import InputError
from unpoison.evaluation import Results, recipes_in

PAGE = "report.html"


def report(options: Report, console: Console, interrupts: Interrupts) -> int:
    """Write the page, alone when `--out` is a .html file, else into a run directory."""
    if not options.runs:
        raise InputError("report: name at least one run directory; see unpoison report --help")
    results = _results(options.runs)
    alone = options.out.suffix.lower() in ((".html", ".htm") if results is None else (".html", ".md", ".tex"))
    if alone and options.out.is_dir():
        raise InputError(f"--out {options.out}: is a directory")
    with session(options, None if alone else options.out, console, interrupts) as run:
        page = options.out if alone else run.artefact("report", PAGE)
        with run.stage("report"):
            if results is None:
                report_room.write_report(page, options.runs)
            else:
                report_room.write_leaderboard(page, results)
        run.results.update(runs=[str(path) for path in options.runs], bytes=page.stat().st_size)
        if alone:
            run.recorder.artefacts["report"] = options.out.name
    console.show(f"the report is {options.out if alone else options.out / Path(PAGE)}")
    return DONE


def _results(places: tuple[Path, ...]) -> Results | None:
    """What is in a store, which goes by its directory or, where it has several recipes, by
    recipes/NAME.json."""
    stores = [place for place in places if recipes_in(place) or recipes_in(place.parent.parent)]
    if not stores:
        return None
    if len(places) > 1:
        raise InputError(f"{stores[0]}: is a store of results; a leaderboard is written of one alone")
    if stores[0].suffix == ".json":
        return Results.read(stores[0].parent.parent, stores[0].stem)
    if not recipes_in(stores[0]):
        return None
    if len(names := recipes_in(stores[0])) > 1:
        raise InputError(
            f"{stores[0]}: has several recipes; name {stores[0] / 'recipes' / names[0]}.json, for example"
        )
    return Results.read(stores[0])
