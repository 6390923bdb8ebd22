"""The pictures are drawn from the store of a recipe, with their numbers."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_stages import InlineExecutor
from tiny_recipe import images

from unpoison.data import write_npz
from unpoison.evaluation import Experiment, plan, sweep

ROOT = Path(__file__).parents[2]

RECIPE = """
name = "pictures"
seeds = [0, 1]
probe = ["logits", "gradients", "norms"]
data.source = "set.npz"
targets.pairs = [["left", "right"]]

[[attacks]]
name = "badnets"
budget = [0.05, 0.1]

[training]
model = "resnet9"
width = 4
epochs = 3
batch_size = 32
learning_rate = 0.05

[[defenses]]
name = "epic"
options = { subset_size = 0.3, interval = 1, warm_up = 1, last_epoch = 2 }

[[defenses]]
name = "epic"
options = { subset_size = 0.6, interval = 1, warm_up = 1, last_epoch = 2 }

[[defenses]]
name = "random-drop"
like = "epic (interval 1, last_epoch 2, subset_size 0.3, warm_up 1)"

[[detectors]]
name = "calibrated"
options = { false_alarm_level = 0.4 }
"""


@pytest.fixture
def plots(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("recipes.plots")


def test_every_picture_is_drawn_with_its_numbers(plots: Any, tmp_path: Path) -> None:
    write_npz(tmp_path / "set.npz", images(120, 0), images(30, 1))
    (tmp_path / "pictures.toml").write_text(RECIPE, encoding="utf-8")
    results = sweep(plan(Experiment.read(tmp_path / "pictures.toml")), tmp_path / "store", InlineExecutor())
    assert results.failures == ()
    words = ["--store", tmp_path / "store", "--recipe", tmp_path / "pictures.toml", "--out", tmp_path / "out"]
    plots.main([*plots.PLOTS, *map(str, words)])
    numbers = {}
    for name in plots.PLOTS:
        assert (tmp_path / f"out/{name}.png").stat().st_size > 1000
        assert (tmp_path / f"out/{name}.svg").stat().st_size > 1000
        record = json.loads((tmp_path / f"out/{name}.json").read_text(encoding="utf-8"))
        assert record["recipe"] == "pictures"
        numbers[name] = record["numbers"]
    assert numbers["budget"]["badnets"]["budget"] == [0.05, 0.1]
    # Two seeds; three epochs and the end. What is dropped is noted before each epoch.
    assert [len(run) for run in numbers["effective"]["poisons"]] == [4, 4]
    assert [len(run) for run in numbers["distances"]["to_class"]["clean"]] == [4, 4]
    dropped = numbers["drops"]["epic (interval 1, last_epoch 2, subset_size 0.6, warm_up 1)"]["clean"]
    assert [len(run) for run in dropped] == [3, 3]
    assert all(run == sorted(run) and run[0] == 0 for run in dropped)
    assert max(max(run) for run in dropped) > 0
    assert numbers["sizes"]["subset_size"] == [0.3, 0.3, 0.6, 0.6]  # of two budgets
    assert all(run[0] == 0 for one in numbers["norms"].values() for run in one["difference"])
    assert len(numbers["logits"]["no defense"]) == 4
    [p_values] = numbers["p_values"].values()
    assert p_values["p_values"] == sorted(p_values["p_values"])
    assert numbers["losses"] == {}  # of crafts that keep a history
    assert len(numbers["poisons"]["indices"]) == 6


def test_a_geometric_mean_with_a_zero_is_not_drawn(plots: Any) -> None:
    assert plots.geometric(np.array([[1.0, 0.0], [4.0, 1.0]]))[0] == 2.0
    assert np.isnan(plots.geometric(np.array([[1.0, 0.0], [4.0, 1.0]]))[1])
