"""The pages of docs/results and their sections, in the order of sections.toml.

A section of a benchmark is titled and described by the docstring of its module, and shown by its function
`tables`, where it has one.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from benchmarks._tables import Row, Section
from benchmarks._values import VALUES, lines, side_by_side

FACTS: Final = Path(__file__).with_name("sections.toml")


def row(module: Any, what: str, wanted: str, kind: str, *more: Any) -> Row:
    """A row; its value is one of the general ones, or a function of the module."""
    read, of = VALUES.get(kind) or getattr(module, kind), more[:1]
    return Row(what, wanted, lambda record: read(record, *of), *more[1:])


def section(entry: Mapping[str, Any]) -> Section:
    """The section of an entry."""
    name = entry.get("benchmark", entry.get("tables"))
    module = import_module(f"benchmarks.{name}") if name else None
    rows = tuple(row(module, *one) for one in entry.get("rows", ()))
    tables = getattr(module, "tables", None)
    if "benchmark" in entry:
        return Section.of(name, module.__doc__, rows, tables)
    if "recipe" in entry:
        tables = side_by_side if entry.get("matrices") else lines
    return Section(
        entry.get("recipe", entry.get("result")), entry["title"], entry.get("about", ""), rows, tables
    )


def read(path: Path = FACTS) -> dict[str, tuple[str, tuple[Section, ...]]]:
    """The title and the sections of each page, by its name."""
    facts = tomllib.loads(path.read_text(encoding="utf-8"))
    return {name: (title, tuple(map(section, facts[name]))) for name, title in facts["titles"].items()}
