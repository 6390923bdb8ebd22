from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import pytest
import torch
from torch import Tensor, nn

from unpoison.data import TrainingSet
from unpoison.errors import InputError, TrainingDivergedError
from unpoison.training import EpochRecord, Recipe
from unpoison.unlearners import SCRUB, BestOf, Healed, Request, Unlearner

RECIPE = Recipe(model="convnet", width=2, epochs=1, batch_size=16, learning_rate=0.05)
FORGET = [1, 3, 5]


class Switch(nn.Module):
    """Predicts class 0 for dark images and class 1 for light ones; `flip` inverts white ones."""

    def __init__(self) -> None:
        super().__init__()
        self.flip = nn.Parameter(torch.zeros(1))
        self.broken = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        level = images.mean((1, 2, 3))
        light = (level > 0.5).float()
        marked = (level > 0.9).float() * self.flip
        right = light * (1 - marked) * (1 - self.broken)
        return 2 * torch.stack([1 - right, right], 1)


def make_set() -> TrainingSet:
    """Dark images of class 0, light ones of class 1, three white ones that are called class 1."""
    labels = torch.arange(40) % 2
    images = (labels * 180).reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8).clone()
    images[FORGET] = 255
    return TrainingSet(images.to(torch.uint8), labels, ("a", "b"), "drawn")


@final
@dataclass(frozen=True, kw_only=True)
class Setting(Unlearner):
    """Sets the switch."""

    flip: float = 0.0
    broken: float = 0.0
    diverges: bool = False
    lose_classes: bool = False

    def _heal(self, request: Request) -> Healed:
        if self.diverges:
            raise TrainingDivergedError("setting: diverged")
        rest = request.rest
        assert len(rest) == 40 - 3 - 2 - 1
        assert torch.equal(request.forget.images, make_set().subset(FORGET).images)
        network = Switch()
        network.flip.data.fill_(self.flip)
        network.broken.data.fill_(self.broken)
        record = EpochRecord(
            epoch=0, loss=self.flip, accuracy=1, learning_rate=1, examples=len(rest), seconds=0
        )
        record.tell(request.progress, 1)
        assert isinstance(request.network, Switch)
        return request.healed(network, [record])


def test_it_chooses_what_forgets_and_keeps_the_accuracy() -> None:
    seen: list[tuple[str, int, int]] = []
    method = BestOf(
        candidates=(Setting(), Setting(diverges=True), Setting(flip=1.0), Setting(flip=1.0, broken=1.0))
    )
    healed = method.heal(
        Switch(),
        make_set(),
        FORGET,
        recipe=RECIPE,
        progress=lambda stage, done, total, /, **_: seen.append((stage, done, total)),
    )
    assert (float(healed.model.get_parameter("flip").detach()), len(healed.history)) == (1.0, 1)
    assert not healed.model.get_parameter("broken").detach().any()
    assert [one for one in seen if one[0] == "candidates"] == [("candidates", n, 4) for n in (1, 2, 3, 4)]
    assert [one for one in seen if one[0] == "training"] == [("training", 1, 1)] * 3
    assert healed.training_fingerprint == make_set().without(FORGET).fingerprint


def test_where_every_candidate_loses_accuracy_the_model_stays() -> None:
    victim = Switch()
    healed = BestOf(candidates=(Setting(flip=1.0, broken=1.0),)).heal(
        victim, make_set(), FORGET, recipe=RECIPE
    )
    assert healed.model is not victim
    assert not healed.model.get_parameter("flip").detach().any()
    assert healed.history == ()


def test_where_every_candidate_diverges_that_is_raised() -> None:
    with pytest.raises(TrainingDivergedError, match="setting: diverged"):
        BestOf(candidates=(Setting(diverges=True),)).heal(Switch(), make_set(), FORGET, recipe=RECIPE)


def test_real_candidates_are_repeatable_and_leave_the_victim_alone() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    method = BestOf(candidates=tuple(SCRUB(learning_rate=rate) for rate in (0.001, 0.1)), tolerance=1.0)
    one, again = (method.heal(network, make_set(), FORGET, recipe=RECIPE, seed=3) for _ in range(2))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": ()}, "one or more unlearners"),
        ({"candidates": ("ssd",)}, "one or more unlearners"),
        ({"candidates": (SCRUB(),), "tolerance": 2}, r"tolerance must be a number in \[0, 1\]"),
    ],
    ids=["none", "a name", "tolerance"],
)
def test_nonsense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BestOf(**options)


def test_nothing_to_forget_is_refused() -> None:
    with pytest.raises(InputError, match="BestOf: there is nothing to forget"):
        BestOf(candidates=(Setting(),)).heal(Switch(), make_set(), [], recipe=RECIPE)
