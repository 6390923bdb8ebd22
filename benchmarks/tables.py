"""Write the README's table and the generated pages of the documentation from what was measured.

    python -m benchmarks.tables            write them
    python -m benchmarks.tables --check    change nothing; end with status 1 when one is out of date

Numbers come from benchmarks/results/*.json and recipes/results/*.json alone. What is said about a result
stands in sections.toml, and in the docstring of the benchmark that makes it. A result that is known but
not there is shown as "not measured"; one that is there but that no page knows is shown on the page of others.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from benchmarks import _guide, _ledger, _published, _sections
from benchmarks._tables import NOT_MEASURED, Record, Section, table

ROOT: Final = Path(__file__).resolve().parents[1]
RESULTS: Final = ("benchmarks/results", "recipes/results")
README, OVERVIEW, FOLDER, OTHERS = "README.md", "docs/benchmarks.md", "docs/results", "others"
LEDGER: Final = f"{FOLDER}/ledger.md"
PUBLISHED: Final = f"{FOLDER}/published.md"
BEGIN, END = "<!-- numbers -->", "<!-- /numbers -->"
WRITTEN: Final = "<!-- Written by python -m benchmarks.tables from the stored results; do not edit. -->"

PAGES: Final = _sections.read()


def read_results(root: Path = ROOT) -> dict[str, Record]:
    """All stored results by name; a recipe's own page is its `page`."""
    found: dict[str, Record] = {}
    for folder in RESULTS:
        for path in sorted((root / folder).glob("*.json")):
            record = json.loads(path.read_text(encoding="utf-8"))
            if path.with_suffix(".md").is_file():
                record["page"] = path.with_suffix(".md").read_text(encoding="utf-8")
            found[path.stem] = record
    return found


def numbers(results: Mapping[str, Record], *, every_row: bool = False) -> str:
    """The table of what was wanted; a section without a result is one row, unless every row is asked for."""
    rows: list[list[str]] = []
    for _, sections in PAGES.values():
        for section in sections:
            record = results.get(section.name)
            if record is None and section.rows and not every_row:
                rows.append([section.title, NOT_MEASURED, "", ""])
            else:
                rows += [row.cells(record) for row in section.rows]
    # A command is named where it changes.
    for earlier, later in reversed(list(itertools.pairwise(rows))):
        if later[3] == earlier[3]:
            later[3] = ""
    return table(("what", "measured", "wanted", "made by"), rows)


def between(name: str, text: str, begin: str, end: str, content: str) -> str:
    """A page with what stands between two lines written anew.

    Raises:
        SystemExit: it has no such lines.
    """
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise SystemExit(f"{name}: needs the lines {begin} and {end}, between which the table goes")
    return f"{before}{begin}\n{content}\n{end}{after}"


def pages(results: Mapping[str, Record]) -> dict[str, str]:
    """The overview, and a page for each topic."""
    known = {section.name for _, sections in PAGES.values() for section in sections}
    others = tuple(
        Section(name, name.replace("_", " ").replace("-", " ").capitalize())
        for name in results
        if name not in known
    )
    topics = {**PAGES, **({OTHERS: ("Other results", others)} if others else {})}
    written = {
        f"{FOLDER}/{name}.md": "\n\n".join(
            (WRITTEN, f"# {title}", *(section.write(results.get(section.name)) for section in sections))
        )
        + "\n"
        for name, (title, sections) in topics.items()
    }
    written[PUBLISHED] = "\n\n".join((WRITTEN, *_published.page(results))) + "\n"
    sections = (section for _, sections in PAGES.values() for section in sections)
    written[LEDGER] = f"{WRITTEN}\n\n{_ledger.ledger(sections, results, _ledger.read())}\n"
    listed = "\n".join(
        ("```{toctree}", ":maxdepth: 1", "", *(f"results/{Path(name).stem}" for name in written), "```")
    )
    about = (
        "What was measured, on which machine, by which command. Every number on this page and those below is "
        "written from the stored results by `python -m benchmarks.tables`; where there is none, it says so. "
        "Where two sides are compared, both do the same work with the same set-up and repeats unless the row "
        'says "another algorithm"; ratios are of the least seconds of each side, theirs over ours. `make '
        "bench` measures the speeds again."
    )
    wanted = ("## What was wanted, and what was measured", numbers(results, every_row=True))
    return {
        OVERVIEW: "\n\n".join((WRITTEN, "# Benchmarks", about, listed, *wanted)) + "\n",
        **written,
    }


def written(root: Path = ROOT) -> dict[str, str]:
    """What each file must hold."""
    results = read_results(root)
    marked = {
        README: (BEGIN, END, numbers(results)),
        _guide.PAGE: (_guide.BEGIN, _guide.END, f"{_guide.situations(results)}\n"),
    }
    return {
        **{
            name: between(name, (root / name).read_text(encoding="utf-8"), *lines)
            for name, lines in marked.items()
        },
        **pages(results),
    }


def main() -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; 1 when a file is out of date")
    check = parser.parse_args().check
    files = written()
    there = (str(path.relative_to(ROOT)) for path in (ROOT / FOLDER).glob("*.md"))
    stale = [name for name in there if name not in files]
    for name in stale if not check else ():
        (ROOT / name).unlink()
    for name, content in files.items():
        path = ROOT / name
        if not path.is_file() or path.read_text(encoding="utf-8") != content:
            stale.append(name)
            if not check:
                path.parent.mkdir(exist_ok=True)
                path.write_text(content, encoding="utf-8", newline="\n")
                print(f"written: {name}")
    if check and stale:
        print(f"out of date: {', '.join(stale)}; run python -m benchmarks.tables", file=sys.stderr)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
