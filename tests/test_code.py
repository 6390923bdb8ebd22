"""Digests of source: which modules count, and which edits change a digest."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import unpoison
from unpoison import detectors
from unpoison._code import Source, code_digest, commit

PACKAGE = Path(unpoison.__file__).parent


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Source]:
    """A copy of the package with one piece of text replaced."""
    shutil.copytree(PACKAGE, tmp_path / "unpoison", ignore=shutil.ignore_patterns("__pycache__"))

    def edit(file: str, old: str = "", new: str = "") -> Source:
        path = tmp_path / "unpoison" / file
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new, 1) if old else text + new, encoding="utf-8")
        return Source(tmp_path)

    return edit


def digest(source: Source, module: str) -> str:
    return source.digest(source.closure(module))


def test_an_edit_of_one_detector_changes_its_digest_alone(edited: Callable[..., Source]) -> None:
    names = detectors.names()
    before = {name: digest(Source(), detectors.METHODS.module(name)) for name in names}
    changed = edited("detectors/trak.py", new="\nEXTRA = 1\n")
    after = {name: digest(changed, detectors.METHODS.module(name)) for name in names}
    assert [name for name in names if after[name] != before[name]] == ["trak"]


def test_an_edit_of_what_a_method_imports_changes_its_digest(edited: Callable[..., Source]) -> None:
    module = detectors.METHODS.module("trak")
    changed = edited("training/_predict.py", new="\nEXTRA = 1\n")
    assert digest(changed, module) != digest(Source(), module)
    # Reached through the lazy package `unpoison.training`, of which nothing else counts.
    assert "unpoison.training._trainer" not in changed.closure(module)


def test_a_change_of_words_keeps_digests(edited: Callable[..., Source]) -> None:
    module = detectors.METHODS.module("deep-knn")
    text = (PACKAGE / "detectors/deep_knn.py").read_text(encoding="utf-8")
    declared = text[text.index("    summary=") :].splitlines()[0]
    edited("detectors/deep_knn.py", declared, '    summary="Other words.",  # and a comment')
    changed = edited("detectors/deep_knn.py", '"""', '"""Other words. ')
    assert digest(changed, module) == digest(Source(), module)
    changed = edited("detectors/deep_knn.py", "@final\n", "OTHER = 1\n\n\n@final\n")
    assert digest(changed, module) != digest(Source(), module)


def test_names_that_are_looked_up_in_a_lazy_package_count(tmp_path: Path) -> None:
    (tmp_path / "unpoison").mkdir()
    (tmp_path / "unpoison/work").mkdir()
    files = {
        "__init__.py": "",
        "one.py": "from unpoison import work\nfrom .two import x\nprint(work.first)",
        "two.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import unpoison.three\nx = 1",
        "three.py": "",
        "work/__init__.py": "",
        "work/__init__.pyi": "from ._first import first as first\nfrom ._second import second as second",
        "work/_first.py": "first = 1",
        "work/_second.py": "second = 2",
    }
    for name, text in files.items():
        (tmp_path / "unpoison" / name).write_text(text, encoding="utf-8")
    source = Source(tmp_path)
    assert source.closure("unpoison.one") == ("unpoison.one", "unpoison.two", "unpoison.work._first")
    assert source.closure("unpoison.work:second") == ("unpoison.work._second",)


def test_a_method_of_another_package_counts_with_what_it_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other_method.py").write_text("from unpoison._seeds import generator\nimport other_helper")
    (tmp_path / "other_helper.py").write_text("import json")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = Source().closure("other_method")
    assert {"other_method", "unpoison._seeds"} <= set(found)
    assert not {"unpoison", "unpoison.training", "json"} & set(found)
    before = Source().digest(["other_method"])
    (tmp_path / "other_method.py").write_text("from unpoison._seeds import derive_seed\nimport other_helper")
    assert Source().digest(["other_method"]) != before


def test_the_running_code_is_named() -> None:
    assert len(code_digest()) == 32
    found = commit()
    assert found == unpoison.__version__ or len(found.removesuffix("-dirty")) == 40
