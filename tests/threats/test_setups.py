from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.threats import read_setups

ENTRY = {"target class": 1, "target index": 4, "base class": 0, "base indices": [6, 3, 6, 0]}


def written(folder: Path, value: Any) -> Path:
    path = folder / "setups.json"
    path.write_text(json.dumps(value))
    return path


@pytest.fixture
def images() -> TrainingSet:
    return TrainingSet(torch.zeros(9, 1, 4, 4, dtype=torch.uint8), torch.arange(9) % 3, ("a", "b", "c"))


def test_set_ups_become_goals_budgets_and_bases(tmp_path: Path, images: TrainingSet) -> None:
    (setup,) = read_setups(written(tmp_path, [ENTRY]))
    assert setup.base_indices == (6, 3, 0)  # one published entry in fifty names a base twice
    assert setup.budget.count_in(len(images)) == 3
    goal = setup.goal(images)
    assert (goal.true_label, goal.target, goal.test_indices) == (1, 0, (4,))
    setup.check_bases(images)


def test_another_set_is_noticed(tmp_path: Path, images: TrainingSet) -> None:
    (setup,) = read_setups(written(tmp_path, [ENTRY]))
    with pytest.raises(InputError, match="test image 4 is not of class 1"):
        setup.goal(images.without([0]))
    with pytest.raises(InputError, match="test image 4 is not of class 1"):
        setup.goal(images.subset([0, 1]))
    with pytest.raises(InputError, match="example 6 is not of class 0"):
        setup.check_bases(images.subset([0, 1, 2, 3, 4, 5, 8]))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "expected a list of set-ups, found dict"),
        ([], "expected a list of set-ups"),
        ([ENTRY, {**ENTRY, "target index": "4"}], "set-up 1: '4' is not a whole number"),
        ([{"target class": 1}], "set-up 0: lacks 'target index'"),
        ([{**ENTRY, "base indices": []}], "set-up 0: has no base indices"),
        ([3], "set-up 0: "),
    ],
)
def test_what_is_not_a_list_of_set_ups_is_refused(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        read_setups(written(tmp_path, value))
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_setups(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("[")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        read_setups(tmp_path / "bad.json")
