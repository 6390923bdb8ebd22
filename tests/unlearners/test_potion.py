from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from unpoison import unlearners
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.training import Recipe, accuracy, train
from unpoison.unlearners import Potion
from unpoison.unlearners._dampening import cross_entropy_of_each, dampen, importances, logit_norm
from unpoison.unlearners.potion import percentile

RECIPE = Recipe(model="convnet", width=4, epochs=12, batch_size=8, learning_rate=0.1)
FORGET = [1, 3, 5]


def make_set() -> TrainingSet:
    """Two classes told apart by their top half, three examples of the first called the second."""
    images = torch.randint(0, 60, (40, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    images[::2, :, :4] += 120
    labels = torch.arange(40) % 2
    images[FORGET, :, 6:, 6:] = 255
    images[FORGET, :, :4] += 120
    return TrainingSet(images.to(torch.uint8), labels, ("a", "b"), "drawn")


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return train(make_set(), RECIPE, seed=0).model


@pytest.mark.parametrize("importance", ["xlf", "assd"])
def test_it_is_the_first_step_of_the_search_that_is_enough(network: nn.Module, importance: Any) -> None:
    examples = make_set()
    poison, kept = examples.subset(FORGET), examples.without(FORGET)
    value, power = (logit_norm, 1) if importance == "xlf" else (cross_entropy_of_each, 2)
    own, reference = (
        importances(network, one, value=value, power=power, method="x") for one in (poison, kept)
    )
    ratio = np.concatenate([(own[name] / reference[name]).flatten().numpy() for name in own])
    ratio = ratio[np.isfinite(ratio)]
    goal, strength = 0.5 * accuracy(network, poison).rate, len(FORGET) / 40 / 25
    for _ in range(500):
        trial = train(examples, Recipe(model="convnet", width=4, epochs=1), seed=0).model
        trial.load_state_dict(network.state_dict())
        threshold = float(np.percentile(ratio, 100 - math.log(1 + 100 * strength)))
        dampen(trial, own, reference, selection=threshold, dampening=1.0)
        if accuracy(trial, poison).rate <= goal or threshold <= 1:
            break
        strength *= 1.5
    healed = Potion(importance=importance, stop_at=0.5, step=1.5).heal(
        network, examples, FORGET, recipe=RECIPE
    )
    for name, found in healed.model.state_dict().items():
        torch.testing.assert_close(found, trial.state_dict()[name], rtol=1e-4, atol=1e-6)
    assert any(
        not torch.equal(value, trial.state_dict()[name]) for name, value in network.state_dict().items()
    )


def test_without_enough_tries_the_last_is_kept(network: nn.Module) -> None:
    examples = make_set()
    healed = Potion(stop_at=0.0, tries=1, start=1e-9).heal(network, examples, FORGET, recipe=RECIPE)
    assert accuracy(healed.model, examples.without(FORGET)).rate > 0.5


@pytest.mark.parametrize("percent", [0, 12.5, 50, 99.9, 100, 120])
def test_percentiles_are_those_of_numpy(percent: float) -> None:
    numbers = torch.rand(17, generator=torch.Generator().manual_seed(0)).sort().values
    expected = np.percentile(numbers.numpy(), min(percent, 100))
    assert float(percentile(numbers, percent)) == pytest.approx(float(expected), rel=1e-5)


def test_as_published() -> None:
    preset = unlearners.get("potion", preset="published", stop_at=0.1)
    assert (preset.stop_at, preset.per_example, preset.batch_size) == (0.1, False, 512)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"importance": "ssd"}, "one of 'xlf', 'assd'"),
        ({"stop_at": 1.0}, r"stop_at must be a number in \[0, 1\)"),
        ({"start": 0}, "start must be a number above 0, found 0"),
        ({"step": 1}, "step must be a number above 1, found 1"),
        ({"tries": 0}, "tries must be a whole number"),
        ({"batch_size": 1.5}, "batch_size must be a whole number"),
    ],
    ids=str,
)
def test_nonsense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Potion(**options)
