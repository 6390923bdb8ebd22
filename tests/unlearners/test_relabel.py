from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from unpoison._seeds import derive_seed
from unpoison.data import TrainingSet
from unpoison.errors import InputError, TrainingDivergedError
from unpoison.training import Recipe, predict, train
from unpoison.unlearners import Relabel
from unpoison.unlearners.relabel import second_best

RECIPE = Recipe(model="resnet9", width=2, epochs=20, batch_size=16, learning_rate=0.05, flip=True)
FORGET = [5, 1, 3]
PLACES = torch.tensor([1, 3, 5])


def make_set() -> TrainingSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (48, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return TrainingSet(images, torch.arange(48) % 3, ("a", "b", "c"), "drawn")


def test_it_trains_on_its_own_second_best_predictions_of_every_epoch() -> None:
    examples = make_set()
    victim = train(examples, replace(RECIPE, epochs=2), seed=0)
    own, network = examples.subset(PLACES), victim.model
    for epoch in range(3):
        logits = predict(network, own.images)
        logits[torch.arange(3), own.labels] = -torch.inf
        rest, answers = examples.without(PLACES), logits.argmax(1)
        relabelled = replace(
            rest,
            images=torch.cat([rest.images, own.images, own.images]),
            labels=torch.cat([rest.labels, answers, answers]),
        )
        one_epoch = replace(
            RECIPE,
            epochs=1,
            learning_rate=0.01 if epoch == 2 else 0.02,
            schedule="cosine" if epoch == 2 else "constant",
        )
        network = train(relabelled, one_epoch, seed=derive_seed(7, "recant", epoch), start=network).model
    healed = Relabel(epochs=0.15, learning_rate=0.4, repeats=2).heal(
        victim, examples, FORGET, recipe=RECIPE, seed=7
    )
    for name, value in healed.model.state_dict().items():
        assert torch.equal(value, network.state_dict()[name])
    assert [record.epoch for record in healed.history] == [0, 1, 2]
    assert healed.recipe == RECIPE


def test_an_example_that_is_still_predicted_as_labelled_is_left_out() -> None:
    class Stubborn(nn.Module):
        """Predicts by the first pixel, whatever it learns."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(192, 3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            answer = images[:, 0, 0, 0].mul(255).round().long() % 3
            logits: torch.Tensor = self.layer(images.flatten(1)) * 1e-9
            return logits + nn.functional.one_hot(answer, 3)

    examples = make_set()
    examples.images[:, 0, 0, 0] = examples.labels.to(torch.uint8)
    examples.images[1, 0, 0, 0] = 2  # predicted otherwise than labelled
    plain = replace(RECIPE, flip=False)
    gentle = Relabel(always_relabel=False).heal(Stubborn(), examples, FORGET, recipe=plain)
    assert [record.examples for record in gentle.history] == [45 + 9, 45 + 3, 45 + 3]
    strict = Relabel().heal(Stubborn(), examples, FORGET, recipe=plain)
    assert [record.examples for record in strict.history] == [45 + 9] * 3


def test_the_second_best_prediction_is_never_the_label() -> None:
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50) % 4
    for row, label, answer in zip(logits, labels, second_best(logits, labels), strict=True):
        others = [number for number in range(4) if number != int(label)]
        assert int(answer) == max(others, key=lambda number: float(row[number]))


@pytest.mark.parametrize(("epochs", "expected"), [(1, 2), (15, 2), (16, 3), (40, 6), (100, 13)])
def test_it_takes_an_eighth_of_the_epochs_and_two_at_least(epochs: int, expected: int) -> None:
    recipe = replace(RECIPE, epochs=epochs, width=1, batch_size=48)
    healed = Relabel().heal(
        train(make_set(), replace(recipe, epochs=1), seed=0), make_set(), FORGET, recipe=recipe
    )
    assert len(healed.history) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, r"epochs must be a number in \(0, 1\], found 0"),
        ({"epochs": 2}, r"epochs must be a number in \(0, 1\], found 2"),
        ({"learning_rate": 0}, "learning_rate must be a number above 0, found 0"),
        ({"repeats": 0}, "repeats must be a whole number of at least 1"),
    ],
    ids=str,
)
def test_nonsense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Relabel(**options)


def test_a_learning_rate_that_is_too_high_is_told() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    with pytest.raises(TrainingDivergedError, match="diverged"):
        Relabel(learning_rate=1.0).heal(
            network, make_set(), FORGET, recipe=replace(RECIPE, learning_rate=1e6, weight_decay=1e3)
        )
