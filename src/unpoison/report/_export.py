"""`write_findings`: findings as a file for people and other programs, or as a folder of the flagged files.

| form | what is written |
|---|---|
| `csv`, `parquet` | a row for each example, in the order of the training set |
| `json` | the flagged examples |
| `list` | the names of the flagged examples, the most suspicious first |
| `unflagged-list` | the names of all others |
| `folder` | hard links to the flagged files, under their names; copies where the place is on another device |
| `sarif` | SARIF 2.1.0, for code scanning |
| `cyclonedx` | a CycloneDX 1.6 bill of materials with data and model |
| `markdown` | a summary for a ticket |

A spreadsheet computes a cell of csv that begins with `=`, `+`, `-`, `@` or a tab, so that the name of a file
or class could run a formula ("CSV injection"). As OWASP advises, an apostrophe is put before such a name,
which `text_of_cell` takes away again, without loss. Numbers stay as they are.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from unpoison._artefacts import atomic_directory, atomic_file
from unpoison.detectors import Findings
from unpoison.errors import InputError
from unpoison.report._cyclonedx import findings_cyclonedx
from unpoison.report._forms import Form
from unpoison.report._provenance import Provenance, within
from unpoison.report._sarif import findings_sarif
from unpoison.report._summary import findings_markdown
from unpoison.runs import json_value

_FORMULA: Final = re.compile(r"'*[=+\-@\t\r\n\uff0b\uff0d\uff1d\uff20]")
"""The characters that OWASP names, the full-width ones among them."""


def write_findings(
    path: str | os.PathLike[str], findings: Findings, form: Form, provenance: Provenance | None = None
) -> int:
    """Write findings to a place where nothing is yet. Nothing is deleted or moved.

    Arguments:
        path: of the file or folder.
        findings: of any detector.
        form: see the module's docstring.
        provenance: of the run; `folder` needs the folder of the training data.

    Returns:
        How many rows, results or files were written.

    Raises:
        InputError: the place exists, the form needs files that are not there, or a name cannot stand in a
            list.
    """
    out = Path(path)
    if out.exists():
        raise InputError(f"{out}: exists already; name another place")
    if form == "folder":
        return _linked(out, findings, provenance)
    with atomic_file(out) as staging:
        return _WRITERS[form](staging, findings, provenance)


def text_of_cell(cell: str) -> str:
    """The name of a file or class that a cell of our csv holds: without the apostrophe before a formula.

    Arguments:
        cell: as `csv` reads it, of the columns `id` and `class`.

    >>> [text_of_cell(cell) for cell in ("'=1+1", "''=1+1", "a=b", "'tis")]
    ['=1+1', "'=1+1", 'a=b', "'tis"]
    """
    return cell[1:] if cell[:1] == "'" and _FORMULA.match(cell) else cell


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


def _csv(path: Path, findings: Findings, _: Provenance | None) -> int:
    rows = rows_of(findings)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["index"])
        writer.writeheader()
        writer.writerows({**row, "id": cell_of(row["id"]), "class": cell_of(row["class"])} for row in rows)
    return len(rows)


def cell_of(text: str) -> str:
    """A text as a cell of csv that no spreadsheet computes.

    >>> [cell_of(text) for text in ("=1+1", "'=1+1", "a=b", "it's")]
    ["'=1+1", "''=1+1", 'a=b', "it's"]
    """
    return f"'{text}" if _FORMULA.match(text) else text


def _parquet(path: Path, findings: Findings, _: Provenance | None) -> int:
    import pyarrow
    import pyarrow.parquet

    rows = rows_of(findings)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return len(rows)


def _json(path: Path, findings: Findings, _: Provenance | None) -> int:
    rows = rows_of(findings)
    kept = [rows[index] for index in findings.flagged.tolist()]
    return _as_json(
        path, {"method": findings.method, "summary": findings.summary, "flagged": kept}, len(kept)
    )


def _list(path: Path, findings: Findings, _: Provenance | None) -> int:
    return _names(path, findings, findings.flagged.tolist())


def _unflagged_list(path: Path, findings: Findings, _: Provenance | None) -> int:
    return _names(path, findings, (~findings.mask()).nonzero()[:, 0].tolist())


def _names(path: Path, findings: Findings, indices: list[int]) -> int:
    names = [findings.name_of(index) for index in indices]
    broken = next((name for name in names if len(name.splitlines()) > 1 or name.endswith("\n")), None)
    if broken is not None:
        raise InputError(
            f"{broken!r}: a name with a line break cannot stand in a list; write json or parquet"
        )
    path.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    return len(names)


def _sarif(path: Path, findings: Findings, provenance: Provenance | None) -> int:
    return _as_json(path, findings_sarif(findings, provenance), len(findings.flagged))


def _cyclonedx(path: Path, findings: Findings, provenance: Provenance | None) -> int:
    bill = findings_cyclonedx(findings, provenance)
    return _as_json(path, bill, len(bill["components"]) + len(findings.flagged))


def _markdown(path: Path, findings: Findings, provenance: Provenance | None) -> int:
    path.write_text(findings_markdown(findings, provenance), encoding="utf-8")
    return len(findings.flagged)


def _as_json(path: Path, value: Mapping[str, Any], rows: int) -> int:
    text = json.dumps(json_value(value), indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
    return rows


def _linked(out: Path, findings: Findings, provenance: Provenance | None) -> int:
    if findings.ids is None:
        raise InputError("the findings name no files, as those of a folder of images do")
    folder = None if provenance is None else provenance.data
    if folder is None or not folder.is_dir():
        raise InputError("a folder of links needs the folder of the training files; name it with --files")
    names = [findings.ids[index] for index in findings.flagged.tolist()]
    for name in names:
        if not within(name):
            raise InputError(f"{name!r} lies outside the folder of the training files")
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: no such file; give the folder that was searched")
    with atomic_directory(out, replace=False) as staging:
        for name in names:
            place = staging / name
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(folder / name, place)
            except OSError:
                shutil.copy2(folder / name, place)
    return len(names)


_WRITERS: Final[Mapping[Form, Callable[[Path, Findings, Provenance | None], int]]] = {
    "csv": _csv,
    "parquet": _parquet,
    "json": _json,
    "list": _list,
    "unflagged-list": _unflagged_list,
    "sarif": _sarif,
    "cyclonedx": _cyclonedx,
    "markdown": _markdown,
}
