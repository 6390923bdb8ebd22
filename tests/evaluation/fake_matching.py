"""An attack on single test images that needs surrogates, and only counts them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import pytest
import torch

from unpoison import attacks
from unpoison.attacks import Attack, CraftRequest
from unpoison.threats import PoisonSet, TargetedMisclassification


@dataclass(frozen=True, kw_only=True)
class FakeMatching(Attack):
    RECIPE: ClassVar[str] = 'name = "fake-matching"\nsurrogates = 2\nsurrogate = { epochs = 2 }'

    def poison(self, request: CraftRequest) -> PoisonSet:
        assert isinstance(request.goal, TargetedMisclassification)
        assert all(not one.training for one in request.models)
        indices = torch.arange(request.count)
        images = request.training_set.images[indices]
        return request.poison_set(
            indices=indices,
            images=images + (images < 255).to(torch.uint8),
            labels=request.training_set.labels[indices],
        )


def fake_matching(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `fake-matching` be one of the attacks."""
    methods: Any = attacks.METHODS
    for name in ("_classes", "_methods"):  # a registration of its own, which ends with the test
        monkeypatch.setattr(methods, name, dict(getattr(methods, name)))
    attacks.register(
        name="fake-matching",
        title="Fake",
        summary="Adds one to pixels.",
        paper="none",
        cost="none",
        labels="clean",
        goals=("targeted-misclassification",),
        surrogates=1,
        accepts_surrogates=True,
    )(final(FakeMatching))
