"""`unpoison export`: findings in; a table, a list of names or a folder of hard links out."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

from unpoison._artefacts import atomic_directory, atomic_file
from unpoison.cli._console import Console
from unpoison.cli._inputs import load_findings
from unpoison.cli._interrupts import Interrupts
from unpoison.cli._options import Export
from unpoison.cli._session import session
from unpoison.detectors import Findings
from unpoison.errors import InputError


def export(options: Export, console: Console, interrupts: Interrupts) -> int:
    """Write the findings in the form that `--as` names."""
    if options.out.exists():
        raise InputError(f"--out {options.out}: exists already; name another place")
    with session(options, None, console, interrupts) as run:
        findings = load_findings(options.findings, "export")
        write = _linked if options.form == "folder" else _written
        written = write(options, findings)
        run.results.update(form=options.form, rows=written, flagged=len(findings.flagged))
        run.recorder.artefacts["export"] = options.out.name
    console.show(f"{written} rows are in {options.out}")
    return 0


def rows_of(findings: Findings) -> list[dict[str, Any]]:
    """A row for each example, in the order of the training set."""
    flagged = findings.mask().tolist()
    scores, labels = findings.scores.tolist(), findings.labels.tolist()
    return [
        {
            "index": index,
            "id": findings.name_of(index),
            "label": labels[index],
            "class": findings.class_names[labels[index]],
            "score": scores[index],
            "flagged": flagged[index],
        }
        for index in range(len(findings))
    ]


def _written(options: Export, findings: Findings) -> int:
    rows = rows_of(findings)
    with atomic_file(options.out) as staging:
        if options.form in ("list", "clean-list"):
            wanted = options.form == "list"
            kept = [row for row in rows if row["flagged"] == wanted]
            if wanted:  # the most suspicious first
                kept = [rows[index] for index in findings.flagged.tolist()]
            for row in kept:
                if "\n" in str(row["id"]) or "\r" in str(row["id"]):
                    raise InputError(
                        f"--as {options.form}: the name {row['id']!r} has several lines; give --as csv"
                    )
            staging.write_text("".join(f"{row['id']}\n" for row in kept), encoding="utf-8")
            return len(kept)
        if options.form == "json":
            kept = [rows[index] for index in findings.flagged.tolist()]
            content = {"method": findings.method, "summary": findings.summary, "flagged": kept}
            staging.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            return len(kept)
        if options.form == "parquet":
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), staging)
            return len(rows)
        with staging.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else ["index"])
            writer.writeheader()
            writer.writerows(rows)
    return len(rows)


def _linked(options: Export, findings: Findings) -> int:
    """Hard links to the flagged files, under their names; a file of another device is copied."""
    import shutil

    if findings.ids is None:
        raise InputError(f"{options.findings}: the findings name no files, as those of a folder of images do")
    if options.files is None:
        raise InputError("--as folder: name the folder of the training files with --files")
    names = [findings.ids[index] for index in findings.flagged.tolist()]
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"{options.findings}: {name!r} lies outside the folder of the training files")
        if not (options.files / name).is_file():
            raise InputError(f"{options.files / name}: no such file; give the folder that was searched")
    with atomic_directory(options.out, replace=False) as staging:
        for name in names:
            place = staging / name
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(options.files / name, place)
            except OSError:
                shutil.copy2(options.files / name, place)
    return len(names)
