from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unpoison import unlearners
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.training import Recipe, train
from unpoison.unlearners import FineTune

RECIPE = Recipe(model="resnet9", width=2, epochs=3, batch_size=16, learning_rate=0.05)


def make_set() -> TrainingSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return TrainingSet(images, torch.arange(40) % 2, ("a", "b"), "drawn")


class Deep(nn.Module):
    """Convolutions with batch norm, one without parameters, dropout; modules counted from the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4))
        self.plain_norm = nn.BatchNorm2d(4, affine=False)
        self.dropout = nn.Dropout(0.5)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.dropout(self.plain_norm(self.stem(images).relu()))
        logits: Tensor = self.head(self.body(hidden).relu().flatten(1))
        return logits


@pytest.fixture
def network() -> Deep:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Deep()


def changed(before: nn.Module, after: nn.Module) -> set[str]:
    old = before.state_dict()
    return {name for name, value in after.state_dict().items() if not torch.equal(value, old[name])}


HEAD = {"head.weight", "head.bias"}
LAST_NORM = {
    "body.1.weight",
    "body.1.bias",
    "body.1.running_mean",
    "body.1.running_var",
    "body.1.num_batches_tracked",
}


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(1, HEAD), (2, HEAD | LAST_NORM), (3, HEAD | LAST_NORM | {"body.0.weight"})],
)
def test_only_the_last_layers_change_batch_norm_statistics_included(
    network: Deep, layers: int, expected: set[str]
) -> None:
    healed = FineTune(layers=layers).heal(network, make_set(), [0], recipe=RECIPE)
    # A convolution's bias before batch norm has a gradient of zero up to rounding.
    assert changed(network, healed.model) - {"body.0.bias"} == expected


def test_frozen_layers_compute_as_in_eval_mode_while_the_rest_is_trained(network: Deep) -> None:
    seen: dict[str, bool] = {}
    for name, module in network.named_modules():
        if not list(module.children()):
            module.register_forward_hook(
                lambda module, inputs, output, name=name: seen.__setitem__(name, module.training)
            )
    FineTune(layers=3).heal(network, make_set(), [0], recipe=RECIPE)
    assert seen == {
        "stem.0": False,
        "stem.1": False,
        "plain_norm": False,
        "dropout": False,
        "body.0": True,
        "body.1": True,
        "head": True,
    }


def test_what_is_frozen_stays_frozen(network: Deep) -> None:
    network.stem.requires_grad_(False)
    healed = FineTune().heal(network, make_set(), [0], recipe=RECIPE)
    frozen = {name for name, one in network.named_parameters() if not one.requires_grad}
    # A convolution's bias before batch norm has a gradient of zero up to rounding.
    trained = set(dict(network.named_parameters())) - frozen - {"body.0.bias"}
    assert changed(network, healed.model) >= trained
    assert not changed(network, healed.model) & frozen
    assert {name for name, one in healed.model.named_parameters() if not one.requires_grad} == frozen
    with pytest.raises(InputError, match=r"every parameter is frozen .* unfreeze"):
        FineTune().heal(network.requires_grad_(False), make_set(), [0], recipe=RECIPE)


def test_it_trains_the_model_further() -> None:
    clean = make_set()
    victim = train(clean, RECIPE, seed=0)
    healed = unlearners.get("fine-tune", preset="published").heal(victim, clean, [1, 2], seed=5)
    expected = train(clean.without([1, 2]), RECIPE, seed=5, start=victim.model)
    assert not changed(expected.model, healed.model)
    assert not healed.own_model


def test_the_network_stays_the_models_when_the_recipe_names_another() -> None:
    clean = make_set()
    victim = train(clean, RECIPE, seed=0)
    healed = FineTune().heal(victim, clean, [1], recipe=Recipe(model="resnet18", epochs=8))
    assert (healed.recipe.model, healed.recipe.width, healed.recipe.epochs) == ("resnet9", 2, 4)
    assert type(healed.model) is type(victim.model)


def test_the_schedule_is_shortened() -> None:
    recipe = Recipe.preset("resnet18-40")
    short = FineTune(epochs=0.1, learning_rate=0.2).recipe_from(recipe)
    assert (short.epochs, short.schedule, short.milestones, short.warmup_epochs) == (4, "cosine", (), 0.0)
    assert short.learning_rate == pytest.approx(0.02)
    assert FineTune(epochs=0.01).recipe_from(recipe).epochs == 1
    assert unlearners.get("fine-tune", preset="published").recipe_from(recipe) == recipe


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, "layers must be one of 'all' or a whole number"),
        ({"layers": True}, "layers must be"),
        ({"layers": "last"}, "layers must be"),
        ({"epochs": 0.0}, r"epochs must be a number in \(0, 1\]"),
        ({"epochs": 2}, r"epochs must be a number in \(0, 1\]"),
        ({"learning_rate": 0}, "must be a number above 0"),
        ({"schedule": "steps"}, "one of 'cosine', 'recipe'"),
        ({"schedule": "recipe"}, "set epochs to 1"),
    ],
    ids=str,
)
def test_nonsense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FineTune(**options)


def test_more_layers_than_there_are_is_refused(network: Deep) -> None:
    with pytest.raises(InputError, match="layers 6 is more than the 5 modules with parameters"):
        FineTune(layers=6).heal(network, make_set(), [0], recipe=RECIPE)
