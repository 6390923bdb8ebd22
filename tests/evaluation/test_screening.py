"""The stage of test-time detectors: a row for each, on triggered and on clean test images."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_stages import InlineExecutor
from tiny_recipe import images, write_recipe

from unpoison.data import write_npz
from unpoison.errors import InputError
from unpoison.evaluation import Experiment, Store, leaderboard, plan, sweep
from unpoison.evaluation._rows import auroc
from unpoison.input_detectors import Screening
from unpoison.report import leaderboard_markdown


def experiment(folder: Path, **changes: Any) -> Experiment:
    values = Experiment.read(write_recipe(folder)).to_dict()
    write_npz(folder / "tiny.npz", images(300, 0), images(300, 1))
    values["data"] |= {"reference_rows": [0, 200], "test_rows": [200, 300]}
    values |= {"seeds": [0], "detectors": [], "unlearners": [], "folder": str(folder)}
    screeners = [
        {"name": "strip", "options": {"overlays": 5}, "clean": 30},
        {"name": "ibd-psc", "preset": "original"},
    ]
    return Experiment.from_dict({**values, "input_detectors": screeners, **changes})


def test_a_row_for_each_test_time_detector(tmp_path: Path) -> None:
    work = plan(experiment(tmp_path))
    results = sweep(work, tmp_path / "store", InlineExecutor())
    assert results.failures == ()
    rows = [row for row in results.table.to_pylist() if row["screened_clean"] is not None]
    assert [row["detector"] for row in rows] == ["strip (overlays 5)", "ibd-psc (original)"]
    stages, store = {stage.key: stage for stage in work.stages}, Store(results.store)
    for row, count in zip(rows, (30, 100), strict=True):
        place = store.place(stages[row["key"]].inputs["screening"])
        clean = Screening.load(place / "clean")
        assert row["screened_clean"] == len(clean) == count
        assert row["screened_triggered"] == row["attack_successes"] > 0
        triggered = Screening.load(place / "triggered")
        higher, lower = triggered.scores.tolist(), clean.scores.tolist()
        wins = sum((a > b) + 0.5 * (a == b) for a in higher for b in lower)
        assert row["screened_auroc"] == pytest.approx(wins / len(higher) / len(lower))
        if row["detector"].startswith("strip"):
            assert row["screened_false_05"] == int((clean.p_values <= 0.05).sum())
            assert row["screened_true_01"] == int((triggered.p_values <= 0.01).sum())
        else:
            assert row["screened_true_01"] == row["screened_true_05"] == len(triggered.flagged)
    lines = [line for line in leaderboard(results) if line.screened_false_05.trials]
    assert [line.screened_false_05.trials for line in lines] == [30, 100]
    assert "screened_auroc" in lines[0].to_dict()
    assert "screened_auroc" not in leaderboard(results)[0].to_dict()
    assert "TPR at 1 % FPR" in leaderboard_markdown(results)


def test_clean_victims_give_false_alarms_alone(tmp_path: Path) -> None:
    results = sweep(
        plan(experiment(tmp_path, attacks=[], targets=None)), tmp_path / "store", InlineExecutor()
    )
    assert results.failures == ()
    rows = [row for row in results.table.to_pylist() if row["screened_clean"] is not None]
    assert [row["screened_triggered"] for row in rows] == [0, 0]
    assert all(row["screened_auroc"] is None for row in rows)


def test_the_area_under_the_curve_is_that_of_sklearn() -> None:
    from sklearn.metrics import roc_auc_score

    draw = random.Random(1)
    higher, lower = ([draw.randint(a, 8) for _ in range(40)] for a in (2, 0))
    found = auroc(torch.tensor(higher).double(), torch.tensor(lower).double())
    assert found == pytest.approx(roc_auc_score([1] * 40 + [0] * 40, higher + lower))


def test_a_recipe_without_clean_examples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.reference_rows"):
        experiment(tmp_path, data={"source": "tiny.npz"})
    with pytest.raises(InputError, match="did you mean 'strip'"):
        experiment(tmp_path, input_detectors=[{"name": "stripp"}])
