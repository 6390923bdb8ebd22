"""The notebooks of the documentation run, do what their prose says, and are kept with their outputs."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted((DOCS / "notebooks").glob("*.md"))


@pytest.fixture(scope="module")
def notebooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("notebooks", DOCS / "notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["notebooks"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run(notebooks: ModuleType, name: str) -> dict[str, Any]:
    """The names that a notebook leaves; what a cell prints is checked against what is kept of it."""
    names: dict[str, Any] = {"__name__": "__main__"}
    kept = notebooks.read(DOCS / "notebooks" / f"{name}.md")
    backend = matplotlib.get_backend()
    for cell, (now, _) in zip(kept, notebooks.run(kept, names), strict=True):
        # Numbers may differ with processor and torch version.
        kept_words, now_words = (re.split(r"\d|:", one.printed)[0] for one in (cell, now))
        assert kept_words == now_words
    matplotlib.use(backend)
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_notebook_of_jupyter_is_the_page(notebooks: ModuleType, page: Path) -> None:
    cells = notebooks.read(page)
    assert "".join(cell.markdown() for cell in cells) == page.read_text(encoding="utf-8")
    kept = json.loads(page.with_suffix(".ipynb").read_text(encoding="utf-8"))
    assert kept == notebooks.notebook(cells, page.parent), "run python docs/notebooks.py"
    assert any(cell.printed for cell in cells)


def test_my_model_is_traced_and_healed(notebooks: ModuleType) -> None:
    names = run(notebooks, "trace_my_model")
    reported, *errors = names["traced"]
    assert reported.poison_found
    assert not any(one.poison_found for one in errors)
    assert names["judged"].precision.rate > 0.8
    assert names["judged"].recall.rate > 0.8
    called_bags = (names["answers"](names["healed"].model, names["with_corner"]) == names["bag"]).sum()
    assert called_bags <= 2


def test_my_pipeline_is_attacked(notebooks: ModuleType) -> None:
    names = run(notebooks, "red_team_my_pipeline")
    rates = [result.attack_success.rate for result in names["measured"]]
    assert rates[0] < 0.05
    assert rates[-1] > 0.4
    assert min(result.clean_accuracy.rate for result in names["measured"]) > 0.85
    assert names["found"].poison_found
    assert names["found"].judge(names["poison"]).recall.rate > 0.8


def test_defenses_are_compared(notebooks: ModuleType) -> None:
    table = run(notebooks, "compare_defenses")["table"]
    success = {place: result.attack_success.rate for place, result in table.items()}
    for attack in ("badnets", "blended"):
        assert success[attack, "no defense"] > 0.8
        assert success[attack, "epic"] < 0.2
        assert success[attack, "loss-drop"] < 0.4
        assert success[attack, "random-drop"] > 0.4


def test_a_figure_needs_a_place(notebooks: ModuleType) -> None:
    drawn = notebooks.Cell("from matplotlib import pyplot\npyplot.figure()\n", is_code=True)
    for cell in (drawn, notebooks.Cell("1\n", is_code=True, picture="there.png")):
        with pytest.raises(ValueError, match="a figure and an image"):
            list(notebooks.run([cell], {}))
