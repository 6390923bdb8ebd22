"""Mixup, CutMix, Cutout and MaxUp: their batches, targets and gradients."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unpoison.defenses import CutMix, Cutout, MaxUp, Mixup
from unpoison.defenses._mixing import dirichlet
from unpoison.errors import InputError
from unpoison.training import Batch, Defense, Recipe, Step

sys.path.insert(0, str(Path(__file__).parent))
from runs import RECIPE, check_run, some_set


def shown(defense: Defense, seed: int = 0, *, plain: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The batch that a defense makes, its targets, and what it was made of."""
    training_set = some_set()
    defense.begin(training_set, RECIPE, seed=0)
    images = torch.rand(24, 1, 12, 12, generator=torch.Generator().manual_seed(9)) if plain is None else plain
    labels = training_set.labels[:24]
    batch = Batch(
        images=(images * 255).to(torch.uint8),
        labels=labels,
        num_classes=training_set.num_classes,
        indices=torch.arange(24),
        epoch=0,
        augment=lambda given: given.float() / 255,
        generator=torch.Generator().manual_seed(seed),
    )
    made, targets = defense.batch(batch)
    return made, targets, (images * 255).to(torch.uint8).float() / 255


@pytest.mark.parametrize("ways", [2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_mixup_is_a_convex_combination(ways: int, seed: int) -> None:
    made, targets, clean = shown(Mixup(ways=ways), seed)
    assert torch.allclose(targets.sum(1), torch.ones(24))
    assert bool((targets >= 0).all())
    draws = torch.Generator().manual_seed(seed)
    weights = dirichlet(1.0, ways, draws)
    expected, shares = weights[0] * clean, weights[0] * F.one_hot(some_set().labels[:24], 3)
    for weight in weights[1:]:
        others = torch.randperm(24, generator=draws)
        expected = expected + weight * clean[others]
        shares = shares + weight * F.one_hot(some_set().labels[:24][others], 3)
    torch.testing.assert_close(made, expected)
    torch.testing.assert_close(targets, shares)


def test_the_weights_are_beta_distributed() -> None:
    draws = torch.Generator().manual_seed(0)
    for alpha, variance in ((1.0, 1 / 12), (0.2, 0.25 / 1.4)):
        weights = torch.stack([dirichlet(alpha, 2, draws)[0] for _ in range(4000)])
        assert abs(float(weights.mean()) - 0.5) < 0.02
        assert abs(float(weights.var()) - variance) < 0.01


@pytest.mark.parametrize("seed", range(6))
def test_cutmix_shares_by_area(seed: int) -> None:
    made, targets, clean = shown(CutMix(), seed)
    foreign = made != clean
    places = foreign.any(0)[0]
    rows, columns = places.any(1).nonzero(), places.any(0).nonzero()
    labels = some_set().labels[:24]
    own = targets.gather(1, labels[:, None])[:, 0]
    assert torch.allclose(targets.sum(1), torch.ones(24))
    share = 1 - float(own.min())
    if not len(rows):
        assert share == 0
        return
    height, width = (int(each.max() - each.min()) + 1 for each in (rows, columns))
    assert bool(places[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all())
    assert share == pytest.approx(height * width / 144, abs=1e-6)


def test_cutout_blacks_out_a_square() -> None:
    made, targets, _ = shown(Cutout(side=6), plain=torch.ones(24, 1, 12, 12))
    assert torch.equal(targets, some_set().labels[:24])
    black = (made == 0).flatten(1).sum(1)
    assert int(black.max()) == 36
    assert int(black.min()) >= 9
    assert len(made.flatten(1).unique(dim=0)) > 10


def test_maxup_follows_the_worst_copy() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 3))
    made, targets, _ = shown(MaxUp(copies=3, cutout=8))
    assert made.shape == (72, 1, 12, 12)
    assert not torch.equal(made[:24], made[24:48])
    torch.testing.assert_close(targets, some_set().labels[:24].repeat(3))

    def loss_of(logits: Tensor, wanted: Tensor, *, reduction: str = "mean") -> Tensor:
        return F.cross_entropy(logits, wanted, reduction=reduction)

    step = Step(
        model=model,
        images=made,
        targets=targets,
        logits_of=model,
        loss_of=loss_of,
        generator=torch.Generator(),
    )
    loss, logits = MaxUp(copies=3).gradients(step)
    logits = logits.detach()
    found = [parameter.grad for parameter in model.parameters()]
    worst = []
    for place in range(24):
        losses = [float(F.cross_entropy(logits[place + 24 * copy], targets[place])) for copy in range(3)]
        worst.append(place + 24 * losses.index(max(losses)))
    expected = F.cross_entropy(model(made[worst]), targets[:24])
    torch.testing.assert_close(loss, expected)
    for one, other in zip(found, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "defense", [Mixup(), Mixup(ways=4, alpha=0.5), CutMix(), Cutout(side=4), MaxUp(copies=2), MaxUp(cutout=4)]
)
def test_it_defends_a_run(defense: Any, tmp_path: Path) -> None:
    trained = check_run(lambda: type(defense)(**options(defense)), tmp_path)
    assert all(0 <= record.accuracy <= 1 for record in trained.history)
    assert [record.examples for record in trained.history] == [40, 40, 40]


def options(defense: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(defense).items() if not name.startswith("_")}


def test_maxup_needs_copies_that_differ() -> None:
    with pytest.raises(InputError, match="all copies would be equal"):
        MaxUp().begin(some_set(), Recipe(), seed=0)
    MaxUp(cutout=3).begin(some_set(), Recipe(), seed=0)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Mixup(alpha=0), "mixup: alpha must be a number"),
        (lambda: Mixup(ways=1), r"mixup: ways must be a whole number in \[2, 64\]"),
        (lambda: CutMix(alpha="1"), "cutmix: alpha must be a number"),
        (lambda: Cutout(side=0), "cutout: side must be a whole number"),
        (lambda: MaxUp(copies=1), "maxup: copies must be a whole number"),
    ],
)
def test_it_refuses(make: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make()
