"""`unpoison export`: findings in; a file for people or other programs, or a folder of links out."""

from __future__ import annotations

from unpoison import report
from unpoison.cli._console import Console
from unpoison.cli._inputs import load_findings
from unpoison.cli._interrupts import Interrupts
from unpoison.cli._options import Export
from unpoison.cli._session import session
from unpoison.cli._status import status_of
from unpoison.errors import InputError


def export(options: Export, console: Console, interrupts: Interrupts) -> int:
    """Write the findings in the form that `--as` names."""
    if options.out.exists():
        raise InputError(f"--out {options.out}: exists already; name another place")
    with session(options, None, console, interrupts) as run:
        findings = load_findings(options.findings, "export")
        origin = report.Provenance.of_run(options.findings, data=options.files, model=options.model)
        if options.form == "cyclonedx":
            for what, place, option in (("data", origin.data, "files"), ("model", origin.model, "model")):
                if place is None:
                    run.console.say(f"the {what} has no hash: no file of it is here; give --{option}")
        written = report.write_findings(options.out, findings, options.form, origin)
        run.results.update(form=options.form, rows=written, flagged=len(findings.flagged))
        run.recorder.artefacts["export"] = options.out.name
    console.show(f"{written} rows are in {options.out}")
    return status_of(options, findings)
