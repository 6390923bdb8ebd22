"""What the README and the documentation say is there: links lead somewhere, examples parse, names exist."""

from __future__ import annotations

import ast
import importlib
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAPERS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("paper", PAPERS, ids=named)
def test_links_lead_somewhere(paper: Path) -> None:
    prose = re.sub(r"```.*?```", "", paper.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", prose)
    lost = [
        target
        for target in targets
        if not target.startswith(("http://", "https://", "#"))
        and not (paper.parent / target.partition("#")[0]).exists()
    ]
    assert not lost


@pytest.mark.parametrize("paper", PAPERS, ids=named)
def test_examples_parse_and_import_what_is_there(paper: Path) -> None:
    for code in re.findall(r"```python\n(.*?)```", paper.read_text(encoding="utf-8"), flags=re.DOTALL):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("unpoison"):
                module = importlib.import_module(node.module)
                public = getattr(module, "__all__", None) or dir(module)
                missing = [alias.name for alias in node.names if alias.name not in public]
                assert not missing, f"{node.module} has no public {', '.join(missing)}"
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "unpoison":
                assert node.attr in importlib.import_module("unpoison").__all__, ast.unparse(node)


def test_every_page_is_in_the_contents() -> None:
    contents = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    listed = re.findall(r"^(?:.*<)?([\w*]+)>?$", contents, flags=re.MULTILINE)
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    assert not [page for page in pages if not any(fnmatch(page, pattern) for pattern in listed)]
