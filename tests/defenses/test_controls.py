"""The controls drop as many as a defense did, in the same epochs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unpoison.defenses import EPIC, DroppingDefense, LossDrop, RandomDrop
from unpoison.errors import InputError


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


def test_the_seed_decides_the_draw(drawn: tuple[Tensor, Tensor]) -> None:
    kept = [RandomDrop(sizes=((1, 50),), seed=seed).select(1, *drawn) for seed in (0, 0, 1)]
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])


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
    ],
)
def test_values_out_of_range(control: type[RandomDrop] | type[LossDrop], wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        control(**wrong)  # type: ignore[arg-type]
