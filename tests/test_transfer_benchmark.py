"""The study of the transfer scenario: its sets, its victims, and that it goes on where it was."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from unpoison._seeds import derive_seed
from unpoison._seeds import generator as seeded
from unpoison.data import TrainingSet
from unpoison.threats import Setup

ROOT = Path(__file__).parents[1]
CLASSES = 3
SETUPS = tuple(
    Setup(
        target_class=0,
        target_index=3 * number,
        base_class=1,
        base_indices=tuple(range(1 + 3 * number, 13 + 3 * number, 3)),
    )
    for number in range(2)
)


@pytest.fixture
def transfer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.transfer")


def some_set(n: int, *, seed: int) -> TrainingSet:
    """Classes that differ in brightness, one after the other."""
    images = torch.randint(0, 128, (n, 3, 8, 8), generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(n) % CLASSES
    return TrainingSet((images + 60 * labels[:, None, None, None]).to(torch.uint8), labels, ("a", "b", "c"))


def study(transfer: ModuleType, out: Path, **options: Any) -> Any:
    recipes = {name: transfer.pretraining(name, 4, 1) for name in ("convnet-bn", "convnet")}
    return transfer.Study(
        some_set(60, seed=0),
        some_set(12, seed=1),
        some_set(60, seed=2),
        some_set(12, seed=3),
        **{
            "setups": SETUPS,
            "recipes": recipes,
            "out": out,
            "trials": 2,
            "steps": 2,
            "epochs": 2,
            "per_class": 8,
            **options,
        },
    )


def test_victims_see_as_many_of_each_class_and_no_base_twice(transfer: ModuleType, tmp_path: Path) -> None:
    whole = study(transfer, tmp_path)
    for number, setup in enumerate(SETUPS):
        places = whole.places(number)
        assert not set(places.tolist()) & set(setup.base_indices)
        assert whole.victims_set(number).class_counts().tolist() == [8, 8, 8]
        # The first of the training set that are no bases.
        others = [index for index in range(2, 60, 3) if index not in setup.base_indices]
        assert places[whole.clean.labels[places] == 2].tolist() == others[:8]


def test_the_layer_is_that_of_plain_descent(transfer: ModuleType) -> None:
    labels = torch.arange(150) % 3
    generator = torch.Generator().manual_seed(0)
    rows = torch.eye(3)[labels] + 0.1 * torch.randn(8, 150, 3, generator=generator)
    state = torch.random.get_rng_state()
    layer = transfer.new_layer(rows, labels, classes=3, rate=0.1, seed=0)
    assert torch.equal(state, torch.random.get_rng_state())
    assert bool((layer(torch.eye(3)).argmax(1) == torch.arange(3)).all())
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(0, "layer"))
        other = nn.Linear(3, 3)
    descent = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)
    for epoch in range(8):
        descent.param_groups[0]["lr"] = 0.1 if epoch < 6 else 0.01
        order = torch.randperm(150, generator=seeded(0, "order", epoch))
        for chosen in (order[:128], order[128:]):
            descent.zero_grad()
            F.cross_entropy(other(rows[epoch, chosen]), labels[chosen]).backward()
            descent.step()
    assert torch.allclose(layer.weight, other.weight, atol=1e-5)
    assert torch.allclose(layer.bias, other.bias, atol=1e-5)


def test_a_study_is_whole_after_any_number_of_stops(transfer: ModuleType, tmp_path: Path) -> None:
    stops = 0
    while True:
        try:
            study(transfer, tmp_path / "pieces", trials=1, minutes=0).run()
        except SystemExit:
            stops += 1
            continue
        break
    assert stops > 10
    study(transfer, tmp_path / "whole", trials=1).run()
    results = [study(transfer, tmp_path / name).summary() for name in ("pieces", "whole")]
    for key in ("controls", "pairs", "set_ups_hit", "setting"):
        assert results[0][key] == results[1][key]
    assert len(results[0]["rows"]) == 2 * 4 * len(transfer.LAYERS)
    rows = results[0]["rows"][:8]
    assert [row["knowledge"] for row in rows] == ["white box"] * 4 + ["black box"] * 4
    assert all(row["success"]["trials"] == 1 for row in rows)
    assert [row["published_percent"] for row in rows] == [22.0, None, 33.0, 85.0, 7.0, None, 7.0, 8.5]
    assert json.loads(json.dumps(results[0])) == results[0]
    with pytest.raises(SystemExit, match="another steps"):
        study(transfer, tmp_path / "pieces", steps=3)


def test_pairs_count_where_only_one_of_two_hits(transfer: ModuleType) -> None:
    hits = [{"hit": hit} for hit in (True, True, True, False, True)]
    others = [{"hit": hit} for hit in (False, False, False, False, True)]
    pair = transfer.compared("one", hits, "other", others)
    assert (pair["only_the_first"], pair["only_the_second"]) == (3, 0)
    assert pair["p_value"] == 0.25
    assert transfer.compared("one", hits, "same", hits)["p_value"] == 1.0
