from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from unpoison import unlearners
from unpoison.data import TrainingSet
from unpoison.errors import InputError, TrainingDivergedError
from unpoison.training import Recipe, accuracy
from unpoison.unlearners import SSD
from unpoison.unlearners._dampening import dampen, importances

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


def copy_of(network: nn.Module) -> nn.Module:
    twin = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 2))
    twin.load_state_dict(network.state_dict())
    return twin


def assert_same(left: nn.Module, right: nn.Module) -> None:
    for name, value in left.state_dict().items():
        torch.testing.assert_close(value, right.state_dict()[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("reference", ["all", "kept"])
def test_it_dampens_by_the_importances_to_all_or_to_the_kept_examples(
    network: nn.Module, reference: Any
) -> None:
    examples = make_set()
    held = examples if reference == "all" else examples.without(FORGET)
    expected = copy_of(network)
    dampen(
        expected,
        importances(network, examples.subset(FORGET), method="x"),
        importances(network, held, method="x"),
        selection=1.5,
        dampening=0.5,
    )
    healed = SSD(selection=1.5, dampening=0.5, reference=reference).heal(
        network, examples, FORGET, recipe=RECIPE
    )
    assert_same(healed.model, expected)
    assert healed.recipe == RECIPE


def test_the_record_shows_what_is_left(network: nn.Module) -> None:
    examples = make_set()
    healed = SSD(selection=1.0, dampening=0.1).heal(network, examples, FORGET, recipe=RECIPE)
    (record,) = healed.history
    assert record.accuracy == accuracy(healed.model, examples.without(FORGET)).rate
    assert (record.examples, record.learning_rate) == (37, 0.0)
    assert healed.seconds >= 0
    assert record.seconds >= 0


def test_chosen_on_held_out_examples_it_forgets_without_losing_accuracy(network: nn.Module) -> None:
    examples = make_set()
    chosen = SSD(selection=None, tolerance=1.0).heal(network, examples, FORGET, recipe=RECIPE)
    forgotten = examples.subset(FORGET)
    assert accuracy(chosen.model, forgotten).rate <= accuracy(network, forgotten).rate
    again = SSD(selection=None, tolerance=1.0).heal(network, examples, FORGET, recipe=RECIPE)
    assert_same(chosen.model, again.model)


def test_as_compared() -> None:
    preset = unlearners.get("ssd", preset="published", selection=50, dampening=0.5)
    assert (preset.selection, preset.dampening) == (50, 0.5)
    assert (preset.reference, preset.per_example, preset.batch_size) == ("kept", False, 512)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": 0}, "selection must be a number above 0 or none, found 0"),
        ({"dampening": float("inf")}, "dampening must be a number above 0, found inf"),
        ({"reference": "some"}, "one of 'all', 'kept'"),
        ({"batch_size": 0}, "batch_size must be a whole number"),
        ({"batch_size": True}, "batch_size must be a whole number"),
        ({"tolerance": -0.1}, r"tolerance must be a number in \[0, 1\]"),
    ],
    ids=str,
)
def test_nonsense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SSD(**options)


def test_a_model_that_has_diverged_is_refused(network: nn.Module) -> None:
    network.get_parameter("1.weight").data.fill_(float("nan"))
    with pytest.raises(TrainingDivergedError, match="ssd: the gradient of parameter"):
        SSD().heal(network, make_set(), FORGET, recipe=RECIPE)


def test_dampening_alone_is_not_chosen() -> None:
    with pytest.raises(InputError, match="dampening must be a number above 0, found None"):
        SSD(dampening=None)  # type: ignore[arg-type]
