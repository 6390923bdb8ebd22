"""The controls drop as many as a defense did, in the same epochs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unpoison.data import TrainingSet
from unpoison.defenses import EPIC, DroppingDefense, LossDrop, RandomDrop
from unpoison.errors import InputError
from unpoison.training import Recipe


@pytest.mark.parametrize("control", [RandomDrop, LossDrop])
def test_as_many_in_the_same_epochs(
    control: type[RandomDrop] | type[LossDrop], drawn: tuple[Tensor, Tensor]
) -> None:
    logits, labels = drawn
    defense = EPIC()
    with pytest.raises(InputError, match="has had no round yet"):
        control.like(defense)
    for epoch, scale in ((10, 1.0), (14, 0.7)):
        defense.select(epoch, scale * logits.roll(epoch, 0), labels)
    same: DroppingDefense = control.like(defense)
    assert [epoch for epoch in range(40) if same.is_round(epoch)] == [10, 14]
    for epoch in (10, 14):
        same.select(epoch, logits, labels)
    assert same.sizes_so_far() == defense.sizes_so_far()


def test_the_highest_losses_go(drawn: tuple[Tensor, Tensor]) -> None:
    logits, labels = drawn
    keep = LossDrop(sizes=((1, 25),)).select(1, logits, labels)
    losses = F.cross_entropy(logits, labels, reduction="none")
    assert int((~keep).sum()) == 25
    assert float(losses[~keep].min()) >= float(losses[keep].max())


def test_the_seed_of_the_run_decides_the_draw(drawn: tuple[Tensor, Tensor]) -> None:
    clean = TrainingSet(torch.zeros(480, 1, 2, 2, dtype=torch.uint8), drawn[1], ("a", "b", "c", "d"))
    kept = []
    for seed in (0, 0, 1):
        defense = RandomDrop(sizes=((1, 50),))
        defense.begin(clean, Recipe(), seed=seed)
        kept.append(defense.select(1, *drawn))
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])
    assert torch.equal(RandomDrop(sizes=((1, 50),)).select(1, *drawn), kept[0])


def test_losses_of_examples_that_are_fit_are_told_apart() -> None:
    """At probabilities of 1 - 1e-12 and nearer to 1, where p - 1 and log p round to 0 in float32."""
    heights = torch.tensor([28.0, 31.0, 29.0, 40.0, 30.0])
    logits = torch.stack([heights, torch.zeros(5)], 1)
    keep = LossDrop(sizes=((1, 2),)).select(1, logits, torch.zeros(5, dtype=torch.int64))
    assert (~keep).nonzero().flatten().tolist() == [0, 2]


@pytest.mark.parametrize("control", [RandomDrop, LossDrop])
def test_never_all_of_them(control: type[RandomDrop] | type[LossDrop], drawn: tuple[Tensor, Tensor]) -> None:
    assert int(control(sizes=((1, 10_000),)).select(1, *drawn).sum()) == 1


@pytest.mark.parametrize("control", [RandomDrop, LossDrop])
@pytest.mark.parametrize(
    "wrong",
    [
        {"sizes": ((3, 1), (2, 1))},
        {"sizes": (3, 1)},
        {"sizes": ((1, -1),)},
        {"sizes": 5},
        {"share": 1.5},
        {"interval": 0},
        {"sizes": ((1, 2, 3),)},
    ],
)
def test_values_out_of_range(control: type[RandomDrop] | type[LossDrop], wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        control(**wrong)  # type: ignore[arg-type]
