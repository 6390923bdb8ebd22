"""ABL: what is isolated, and what each stage minimises, against plain loops."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unpoison.defenses import ABL
from unpoison.errors import InputError
from unpoison.training import Batch, Recipe, Step, predict, train

sys.path.insert(0, str(Path(__file__).parent))
from runs import RECIPE, check_run, some_set


def test_it_repeats_and_resumes(tmp_path: Path) -> None:
    recipe = replace(RECIPE, epochs=4)
    resumed = check_run(lambda: ABL(isolated=0.1, turning=0.25, unlearning=0.3), tmp_path, recipe)
    assert resumed.defense is not None
    assert resumed.defense["abl"] == {"isolated": 4, "turning_epoch": 1}
    assert len(resumed.dropped) == 4


def test_the_lowest_losses_are_isolated() -> None:
    examples, defense = some_set(), ABL(isolated=0.15, turning=0.5)
    model = train(examples, RECIPE, seed=0).model
    defense.begin(examples, Recipe(epochs=4), seed=0)
    alive = torch.ones(40, dtype=torch.bool)
    alive[3] = False
    assert torch.equal(defense.keep(1, model, examples, alive), alive)
    kept = defense.keep(2, model, examples, alive)
    logits = predict(model, examples.images)
    losses = F.cross_entropy(logits, examples.labels, reduction="none")
    chosen = sorted(alive.nonzero()[:, 0].tolist(), key=lambda one: float(losses[one]))
    assert sorted((alive & ~kept).nonzero()[:, 0].tolist()) == sorted(chosen[:5])
    assert torch.equal(defense.keep(3, model, examples, kept), kept)


@pytest.mark.parametrize(("epoch", "limit"), [(0, None), (2, None), (4, None), (4, 1.0)])
def test_each_stage_minimises_what_the_paper_says(epoch: int, limit: float | None) -> None:
    examples, defense = some_set(), ABL(isolated=0.1, turning=0.4, unlearning=0.2, limit=limit)
    model: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(144, 3))
    torch.manual_seed(0)
    nn.init.normal_(model[1].weight, std=0.05)  # type: ignore[index]
    defense.begin(examples, Recipe(epochs=5), seed=0)
    alive = torch.ones(40, dtype=torch.bool)
    for number in range(epoch + 1):
        alive = defense.keep(number, model, examples, alive)
    rows = alive.nonzero()[:8, 0]
    batch = Batch(
        images=examples.images[rows],
        labels=examples.labels[rows],
        num_classes=3,
        indices=rows,
        epoch=epoch,
        augment=lambda images: images / 255,
        generator=torch.Generator().manual_seed(0),
    )
    images, targets = defense.batch(batch)
    assert len(images) == (8 if epoch < 4 else 12)  # with the four that are isolated

    def loss_of(logits: Tensor, labels: Tensor, **more: Any) -> Tensor:
        return F.cross_entropy(logits, labels, **more)

    step = Step(
        model=model,
        images=images,
        targets=targets,
        logits_of=model,
        loss_of=loss_of,
        generator=torch.Generator(),
    )
    value, _ = defense.gradients(step)
    expected = 0.0
    for place, (image, label) in enumerate(zip(images, targets, strict=True)):
        loss = float(F.cross_entropy(model(image[None]), label[None]).detach())
        if epoch < 2:
            expected += (1 if loss > 0.5 else -1) * loss / 8
        elif place < 8:
            expected += loss / 8
        else:
            expected -= (loss if limit is None else min(loss, limit)) / 4
    assert float(value.detach()) == pytest.approx(expected, rel=1e-5)


def test_a_short_run_and_wrong_options() -> None:
    trained = train(some_set(), replace(RECIPE, epochs=1), seed=0, defense=ABL())
    assert trained.defense is not None
    assert trained.defense["abl"] == {"isolated": 0, "turning_epoch": 1}
    few = some_set(3)
    assert len(train(few, replace(RECIPE, epochs=2), seed=0, defense=ABL(isolated=0.4)).dropped) == 1
    with pytest.raises(InputError, match="abl: isolated"):
        ABL(isolated=1.0)
