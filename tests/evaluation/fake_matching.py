"""An attack on single test images that needs surrogates, and does nothing but look at them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from unpoison.attacks import Attack, AttackCard, _registry
from unpoison.data import TrainingSet
from unpoison.threats import Budget, Goal, PoisonSet, TargetedMisclassification

CARD = AttackCard(
    name="fake-matching",
    title="Fake",
    summary="Adds one to pixels.",
    knowledge="networks",
    labels="clean",
    goals=("targeted-misclassification",),
    paper="none",
    cost="none",
    implementation="fake_matching:FakeMatching",
    surrogates=1,
)


def fake_matching(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `fake-matching` be one of the attacks."""
    monkeypatch.setitem(_registry._CARDS, CARD.name, CARD)


@dataclass(frozen=True, kw_only=True)
class FakeMatching(Attack):
    RECIPE: ClassVar[str] = 'name = "fake-matching"\nsurrogates = 2\nsurrogate = { epochs = 2 }'

    def craft(
        self,
        goal: Goal,
        training_set: TrainingSet,
        *,
        budget: Budget,
        surrogate: nn.Module | Sequence[nn.Module] | None = None,
        seed: int,
    ) -> PoisonSet:
        assert isinstance(goal, TargetedMisclassification)
        networks: Any = surrogate
        assert all(isinstance(one, nn.Module) and not one.training for one in networks)
        indices = torch.arange(budget.count_in(len(training_set)))
        images = training_set.images[indices]
        return PoisonSet.of(
            training_set,
            indices=indices,
            images=images + (images < 255).to(torch.uint8),
            given_labels=training_set.labels[indices],
            goal=goal,
            attack=CARD.name,
            configuration={"surrogates": len(networks)},
            seed=seed,
        )
