"""Healing by a training function of one's own: what it is given, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import unpoison
from unpoison.data import TrainingSet
from unpoison.errors import InputError, MismatchError
from unpoison.training import Trained


class Vectors:
    """A dataset of ten numbers a row, whose label is the sign of the first."""

    classes = ("low", "high")

    def __init__(self, count: int = 40) -> None:
        self.values = torch.randn(count, 10, generator=torch.Generator().manual_seed(0))
        self.reads: list[int] = []

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.reads.append(index)
        return self.values[index], int(self.values[index, 0] > 0)


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 2))


def test_the_function_is_given_the_kept_indices_and_a_subset_of_the_dataset() -> None:
    dataset, model, given = Vectors(), network().train(), []
    before = copy.deepcopy(model.state_dict())

    def retrain(kept: list[int], subset: Subset[Any]) -> nn.Module:
        given.append((kept, subset))
        fresh = network(1)
        optimizer = torch.optim.SGD(fresh.parameters(), lr=0.1)
        for inputs, labels in DataLoader(subset, batch_size=8):
            optimizer.zero_grad()
            nn.functional.cross_entropy(fresh(inputs), labels).backward()
            optimizer.step()
        return fresh

    healed = unpoison.heal(model, dataset, [7, 3, 3], retrain=retrain)
    ((kept, subset),) = given
    assert kept == [index for index in range(40) if index not in (3, 7)]
    assert isinstance(subset, Subset)
    assert subset.dataset is dataset
    assert list(subset.indices) == kept
    assert healed.own_model
    assert not healed.model.training
    assert healed.class_names == ("low", "high")
    assert healed.image_shape == (10,)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    other = unpoison.heal(model, dataset, [7, 3], retrain=lambda kept, subset: network(2))
    assert healed.training_fingerprint == other.training_fingerprint


def test_findings_of_images_and_a_trained_model_will_do(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (24, 1, 4, 4), dtype=torch.uint8)
    dataset = TrainingSet(images, torch.arange(24) % 2, ("a", "b"))
    recipe = unpoison.Recipe(model="convnet", width=2, epochs=1, batch_size=8)
    victim = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    findings = unpoison.scan(victim, dataset, method="spectral-signatures")
    findings = replace(findings, flagged=torch.tensor([4, 1]))

    def retrain(kept: list[int], subset: Subset[Any]) -> Trained:
        return unpoison.train(dataset.subset(kept), recipe, start=copy.deepcopy(victim))

    healed = unpoison.heal(victim, dataset, findings, retrain=retrain)
    assert healed.training_fingerprint == dataset.without(findings.flagged).fingerprint
    own = unpoison.heal(victim, dataset, findings, retrain=lambda kept, subset: copy.deepcopy(victim))
    own.save(tmp_path / "healed")
    again = Trained.load(tmp_path / "healed", model=copy.deepcopy(victim))
    assert again.image_shape == (1, 4, 4)
    with pytest.raises(MismatchError, match="another training set"):
        unpoison.heal(victim, dataset.subset(range(20)), findings, retrain=retrain)


def test_what_cannot_be_healed_so_is_refused() -> None:
    dataset, model = Vectors(), network()
    low = [index for index in range(40) if dataset.values[index, 0] <= 0]
    cases: list[tuple[Any, Any, str]] = [
        ([], lambda kept, subset: network(), "nothing to forget"),
        ([40], lambda kept, subset: network(), r"example 40 is outside 0\.\.39"),
        ([1.5], lambda kept, subset: network(), r"indices must be whole numbers, found torch\.float32"),
        (list(range(40)), lambda kept, subset: network(), "all 40 examples"),
        (low, lambda kept, subset: network(), r"leaves none of class 0 \(low\)"),
        ([1], lambda kept, subset: None, "returned NoneType; return the trained network"),
        ([1], lambda kept, subset: model, "the model that is to be healed"),
        ([1], lambda kept, subset: nn.Linear(9, 2), "fails on"),
    ]
    for forget, retrain, words in cases:
        with pytest.raises(InputError, match=words) as error:
            unpoison.heal(model, dataset, forget, retrain=retrain)
        assert "\n" not in str(error.value)
    method = unpoison.unlearners.get("retrain", lose_classes=True)
    assert unpoison.heal(model, dataset, low, method=method, retrain=lambda kept, subset: network(1))
