"""Short defended runs on a tiny set, and logits, for the tests of single defenses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from unpoison.data import TrainingSet
from unpoison.training import Defense, Recipe, Trained, train

RECIPE = Recipe(
    model="resnet9", width=2, epochs=3, batch_size=16, learning_rate=0.05, flip=True, crop_padding=1
)


def some_set(n: int = 40, *, channels: int = 1) -> TrainingSet:
    """Three classes that differ in brightness."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 3
    images = torch.randint(0, 128, (n, channels, 12, 12), generator=generator)
    return TrainingSet((images + 60 * labels[:, None, None, None]).to(torch.uint8), labels, ("a", "b", "c"))


def draw_logits(counts: tuple[int, ...], *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits Float[n classes] and labels Int64[n] in order, confident for most examples."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    logits = torch.randn(len(labels), len(counts), generator=generator)
    logits[torch.arange(len(labels)), labels] += 2 + 6 * torch.rand(len(labels), generator=generator)
    return logits, labels


def same(first: nn.Module, second: nn.Module) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def check_run(make: Callable[[], Defense], directory: Path, recipe: Recipe = RECIPE) -> Trained:
    """Defend a run: it differs from an undefended one, repeats, and resumes to the same weights; an object
    that has defended another run before does the same."""

    def interrupt(stage: str, done: int, total: int, /, **metrics: float) -> None:
        if done == 2:
            raise KeyboardInterrupt

    used = make()
    other = train(some_set(), replace(recipe, epochs=3), seed=5, defense=used)
    whole = train(some_set(), recipe, seed=0, defense=used)
    assert not same(whole.model, other.model)
    assert not same(whole.model, train(some_set(), recipe, seed=0).model)
    with pytest.raises(KeyboardInterrupt):
        train(some_set(), recipe, seed=0, defense=make(), checkpoints=directory, progress=interrupt)
    resumed = train(some_set(), recipe, seed=0, defense=make(), checkpoints=directory)
    assert same(whole.model, resumed.model)
    assert whole.defense is not None
    assert resumed.defense is not None
    assert whole.defense["name"] == repr(make())
    assert whole.defense.keys() == resumed.defense.keys()
    return resumed
