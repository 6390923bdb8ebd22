from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from unpoison import unlearners
from unpoison._seeds import derive_seed
from unpoison.data import TrainingSet
from unpoison.errors import InputError, TrainingDivergedError
from unpoison.models import reinitialized
from unpoison.training import Recipe
from unpoison.unlearners import BadTeaching
from unpoison.unlearners._student import soft_divergence

RECIPE = Recipe(model="convnet", width=2, epochs=1, batch_size=16, learning_rate=0.05)
FORGET = [1, 3, 5]


def make_set() -> TrainingSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return TrainingSet(images, torch.arange(40) % 2, ("a", "b"), "drawn")


@pytest.fixture
def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 2))


def test_the_incompetent_teacher_teaches_what_is_forgotten_and_the_model_the_rest(
    network: nn.Module,
) -> None:
    examples, seed = make_set(), 3
    incompetent = reinitialized(network, seed=derive_seed(seed, "bad-teaching", "teacher"))
    student = copy.deepcopy(network)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5, momentum=0.9, weight_decay=5e-4)
    images, _ = examples.batch(0, 40)
    with torch.no_grad():
        told = torch.stack(
            [(incompetent if n in FORGET else network)(images[n : n + 1])[0] for n in range(40)]
        )
    for _ in range(2):
        p, q = (told / 2).softmax(1), (student(images) / 2).softmax(1)
        loss = (p * (p / q).log()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    method = BadTeaching(
        epochs=2, kept_share=1.0, optimizer="sgd", learning_rate=0.5, batch_size=100, temperature=2.0
    )
    healed = method.heal(network, examples, FORGET, recipe=RECIPE, seed=seed)
    for name, value in healed.model.state_dict().items():
        torch.testing.assert_close(value, student.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_the_divergence_is_that_of_its_definition() -> None:
    logits, told = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    p, q = told.softmax(1), logits.softmax(1)
    torch.testing.assert_close(soft_divergence(logits, told, 1.0).float(), (p * (p / q).log()).sum(1))


def test_it_sees_a_share_of_the_kept_examples_and_all_to_forget(network: nn.Module) -> None:
    healed = BadTeaching(epochs=2).heal(network, make_set(), FORGET, recipe=RECIPE)
    assert [record.examples for record in healed.history] == [3 + 11, 3 + 11]
    fewest = BadTeaching(kept_share=1e-9).heal(network, make_set(), FORGET, recipe=RECIPE)
    assert fewest.history[0].examples == 4


def test_it_ends_with_its_steps(network: nn.Module) -> None:
    method = BadTeaching(epochs=5, kept_share=1.0, batch_size=10, steps=6)
    healed = method.heal(network, make_set(), FORGET, recipe=RECIPE)
    assert [record.examples for record in healed.history] == [40, 20]


def test_the_settings_of_the_paper_and_of_the_comparison() -> None:
    paper = BadTeaching()
    assert (paper.optimizer, paper.learning_rate, paper.epochs, paper.batch_size) == ("adam", 1e-4, 1, 256)
    compared = unlearners.get("bad-teaching", preset="published")
    assert (compared.optimizer, compared.learning_rate, compared.steps) == ("sgd", 0.025, 40)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be a whole number"),
        ({"batch_size": 1}, "batch_size must be a whole number of at least 2"),
        ({"steps": True}, "steps must be a whole number"),
        ({"kept_share": 0}, r"kept_share must be a number in \(0, 1\], found 0"),
        ({"optimizer": "lion"}, "one of 'adam', 'sgd'"),
        ({"learning_rate": -1}, "learning_rate must be a number above 0, found -1"),
        ({"temperature": 0}, "temperature must be a number above 0, found 0"),
    ],
    ids=str,
)
def test_nonsense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BadTeaching(**options)


def test_a_learning_rate_that_is_too_high_is_told(network: nn.Module) -> None:
    method = BadTeaching(optimizer="sgd", learning_rate=1e30, epochs=3, batch_size=8)
    with pytest.raises(TrainingDivergedError, match="bad-teaching: diverged"):
        method.heal(network, make_set(), FORGET, recipe=RECIPE)
