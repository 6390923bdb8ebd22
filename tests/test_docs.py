"""README and documentation: links, examples, the tutorial, the public API and the generated tables."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import unpoison
from unpoison import attacks, defenses, detectors, report, unlearners
from unpoison.errors import MissingExtraError

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def generated() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generated", DOCS / "_ext" / "generated.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    lost = [
        target
        for target in targets
        if not target.startswith(("http://", "https://", "#"))
        and not (page.parent / target.partition("#")[0]).exists()
    ]
    assert not lost


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_examples_parse_and_import_what_is_there(page: Path) -> None:
    for code in python_blocks(page):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("unpoison"):
                try:
                    module = importlib.import_module(node.module)
                except MissingExtraError:
                    continue  # tried where the extra is installed, by tests/compatibility
                public = getattr(module, "__all__", None) or dir(module)
                missing = [alias.name for alias in node.names if alias.name not in public]
                assert not missing, f"{node.module} has no public {', '.join(missing)}"
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "unpoison":
                assert node.attr in unpoison.__all__, ast.unparse(node)


def test_every_page_is_in_the_contents() -> None:
    listed: set[str] = set()
    for page in DOCS.rglob("*.md"):
        for block in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            listed |= {line for line in block.splitlines() if line and not line.startswith(":")}
    assert listed == {path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md")} - {
        "index"
    }


def test_the_api_page_has_every_public_package() -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"automodule:: (unpoison[.\w]*)", text))
    modules = {name for name in unpoison.__all__ if isinstance(getattr(unpoison, name), ModuleType)}
    assert documented == {f"unpoison.{name}" for name in modules} | {"unpoison.workflow"}
    [verbs] = re.findall(r"unpoison\.workflow\n   :members: (.*)", text)
    others = set(unpoison.__all__) - modules - set(verbs.split(", "))
    assert not {name for name in others if f"`{name}`" not in text}


def test_the_tables_have_every_method(generated: ModuleType) -> None:
    for package in (attacks, defenses, detectors, unlearners):
        lines = generated.methods(package.METHODS.kind)
        assert len(lines) == 2 + len(package.names())
        for name, line in zip(package.names(), lines[2:], strict=True):
            method = package.describe(name)
            assert line.startswith(f"| `{name}`: **{method.title}.**")
            assert all(f"`{preset}`" in line for preset in method.presets)
    tracing = "\n".join(generated.methods("detector", "needs_observation"))
    scanning = "\n".join(generated.methods("detector", "not_needs_observation"))
    assert "`ek-fac`" in tracing
    assert "`ek-fac`" not in scanning
    assert "`deep-knn`" in scanning
    assert "`deep-knn`" not in tracing


def test_the_tables_have_every_option(generated: ModuleType) -> None:
    text = "\n".join(generated.options("trace"))
    assert "| `--suspect SUSPECT...` | The input that is classified wrongly" in text
    assert "| `--model MODEL` | A run directory of train or heal" in text  # of a class that verbs share
    assert "| `--task KEY=VALUE...` | How the logits are read" in text
    assert "delta-influence" in text
    assert "`--weights FILE`" in text
    assert "--seed" not in text
    assert "| `--device auto\\|cpu\\|cuda` |" in "\n".join(generated.shared_options())
    assert "| `RECIPE.toml` |" in "\n".join(generated.options("bench"))
    assert "| `--as FORM` |" in "\n".join(generated.options("export"))


def test_every_paper_of_a_method_can_be_cited(generated: ModuleType) -> None:
    named, listed = set(generated.methods_of_papers()), (DOCS / "papers.bib").read_text(encoding="utf-8")
    assert not {arxiv for arxiv in named if f"eprint = {{{arxiv}}}" not in listed}, (
        "add them to docs/papers.bib"
    )
    assert len(generated.papers()) == 2 + len(named)
    keys = re.findall(r"@misc\{(.*?),", listed)
    assert len(keys) == len(set(keys)) == listed.count("archivePrefix = {arXiv}")


def test_the_citation_is_of_this_version_and_complete() -> None:
    given = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "type", "version", "license"} <= set(given)
    assert given["cff-version"] == "1.2.0"
    assert given["version"] == unpoison.__version__
    papers = (DOCS / "papers.bib").read_text(encoding="utf-8")
    for reference in given["references"]:
        assert {"type", "title", "authors"} <= set(reference)
        assert f"title = {{{{{reference['title']}}}}}" in papers
        [doi] = reference["identifiers"]
        assert f"eprint = {{{doi['value'].removeprefix('10.48550/arXiv.')}}}" in papers


def test_the_identifiers_of_exports_are_on_the_page_for_security_people(generated: ModuleType) -> None:
    text = "\n".join(generated.identifiers())
    assert all(one.id in text and one.uri in text for one in report.identifiers_of(traced=True))
    assert text.count("| yes |") == 2
    assert "```{identifiers}" in (DOCS / "security.md").read_text(encoding="utf-8")


def test_the_tutorial_runs_and_heals(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for code in python_blocks(DOCS / "tutorial.md"):
        exec(compile(code, "tutorial.md", "exec"), names)
    assert names["before"].attack_success.rate > 0.9
    assert names["after"].attack_success.rate < 0.1
    assert names["after"].clean_accuracy.rate > names["before"].clean_accuracy.rate - 0.02
    assert names["findings"].poison_found
    judgement = names["findings"].judge(names["poison"])
    assert judgement.precision.rate > 0.8
    assert judgement.recall.rate > 0.9
    assert "predicted Bag" in capsys.readouterr().out
