"""kNN outlier filter: groups of copies are outliers too, and no class loses more than its share."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from unpoison.defenses import EPIC, KNNOutlierFilter, isolated, outliers
from unpoison.defenses.knn_outlier_filter import _kth_distance, _kth_distance_in_blocks, distances
from unpoison.errors import InputError
from unpoison.training import Recipe

sys.path.insert(0, str(Path(__file__).parent))
from runs import draw_logits


def with_poison(counts: tuple[int, ...], *, copies: int, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """Confident clean examples, and six poisons of class 0 far from it, each in several near-copies."""
    generator = torch.Generator().manual_seed(9)
    logits, labels = draw_logits(counts)
    logits[torch.arange(len(labels)), labels] += 3
    far = 6.0 * torch.tensor(
        [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 1, 1, 0], [0, 0, 1, 1], [0, 1, 0, 1]]
    )
    far = far.repeat_interleave(copies, 0)
    far = far + noise * torch.randn(far.shape, generator=generator)
    poisoned = torch.cat([logits, far])
    truth = torch.arange(len(poisoned)) >= len(logits)
    return poisoned, torch.cat([labels, torch.zeros(len(far), dtype=torch.int64)]), truth


def test_distances_are_those_of_plain_loops(drawn: tuple[Tensor, Tensor]) -> None:
    logits, labels = drawn
    among = torch.rand(len(labels), generator=torch.Generator().manual_seed(0)) < 0.7
    found = distances(logits, labels, neighbours=3, merge=0.0, among=among).tolist()
    gradients = logits.double().softmax(1) - torch.nn.functional.one_hot(labels, 4)
    rows = gradients.tolist()
    for i in range(0, len(rows), 7):
        others = [
            math.dist(rows[i], rows[j])
            for j in range(len(rows))
            if j != i and labels[j] == labels[i] and bool(among[j])
        ]
        assert found[i] == (pytest.approx(sorted(others)[2], abs=1e-7) if bool(among[i]) else 0.0)


def test_tree_and_blocks_agree() -> None:
    points = torch.rand(200, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        _kth_distance(points, 4), _kth_distance_in_blocks(points, 4), atol=1e-6, rtol=1e-6
    )
    wide = torch.rand(30, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        _kth_distance(wide, 2), torch.cdist(wide, wide).sort().values[:, 2], atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize("copies", [1, 2, 4])
def test_pairs_evade_epic_and_not_this(noise: float, copies: int) -> None:
    logits, labels, truth = with_poison((300,) * 4, copies=copies, noise=noise)
    recall = {
        "epic": float(isolated(logits, labels, subset_size=0.1)[truth].double().mean()),
        "ours": float(outliers(logits, labels, max_fraction=0.1)[truth].double().mean()),
    }
    assert recall["ours"] == 1.0
    if copies == 1:
        assert recall["epic"] > 0.8
    else:
        # Neither is alone in its cluster.
        assert recall["epic"] < 0.2


def test_many_copies_are_outliers_too() -> None:
    logits, labels, truth = with_poison((2000, 50, 50, 50), copies=15, noise=0.01)
    assert bool(outliers(logits, labels, max_fraction=0.1)[truth].all())
    assert not bool(outliers(logits, labels, max_fraction=0.1, merge=0.0, neighbours=8)[truth].any())


@pytest.mark.parametrize("size", [1, 2, 5, 9, 10, 19, 50])
def test_no_class_loses_more_than_its_share(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    logits = 4 * torch.randn(4 * size, 4, generator=generator)
    labels = torch.arange(4).repeat_interleave(size)
    dropped = outliers(logits, labels, max_fraction=0.1, min_distance=0.0, iqr_factor=0.0)
    assert bool((torch.bincount(labels[dropped], minlength=4) <= int(0.1 * size)).all())


def test_a_class_without_outliers_loses_nothing() -> None:
    logits = torch.tensor([[6.0, 0.0, 0.0]]).repeat(100, 1)
    logits += 0.3 * torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    assert not bool(outliers(logits, torch.zeros(100, dtype=torch.int64)).any())


def test_the_order_of_the_examples_does_not_matter(drawn: tuple[Tensor, Tensor]) -> None:
    logits, labels = drawn
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    every = torch.ones_like(labels, dtype=torch.bool)
    torch.testing.assert_close(
        distances(logits, labels, neighbours=8, merge=0.05, among=every)[shuffled],
        distances(logits[shuffled], labels[shuffled], neighbours=8, merge=0.05, among=every),
    )
    # Of two that are each other's m-th neighbour, at the edge of the cap, the first goes.
    one, other = outliers(logits, labels)[shuffled], outliers(logits[shuffled], labels[shuffled])
    assert int(one.sum()) == int(other.sum())
    assert int((one != other).sum()) <= 2 * 4


def test_nothing_is_dropped_at_a_low_training_accuracy(drawn: tuple[Tensor, Tensor]) -> None:
    logits, labels = drawn
    defense = KNNOutlierFilter(epochs=(3, 6), iqr_factor=0.0, min_distance=0.0)
    assert bool(defense.select(3, logits.roll(1, 1), labels).all())
    later = defense.select(6, logits, labels)
    assert int((~later).sum()) == 4 * int(0.1 * 120)


def test_the_cap_grows_from_round_to_round(drawn: tuple[Tensor, Tensor]) -> None:
    logits, labels = drawn
    defense = KNNOutlierFilter(epochs=(2, 5, 9), max_fraction=0.2, iqr_factor=0.0, min_distance=0.0)
    for epoch in (2, 5, 9):
        defense.select(epoch, logits, labels)
    assert [report.in_all for report in defense.reports] == [4 * 8, 4 * 16, 4 * 24]


def test_few_rounds() -> None:
    for epochs, most in ((5, 1), (15, 1), (40, 4), (200, 5)):
        chosen = KNNOutlierFilter.for_recipe(Recipe(epochs=epochs)).epochs
        assert chosen is not None
        assert len(chosen) == most
        assert epochs / 4 <= min(chosen) <= max(chosen) <= 3 * epochs / 4


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_fraction": 1.5},
        {"neighbours": 0},
        {"merge": -1.0},
        {"iqr_factor": math.nan},
        {"min_distance": 3.0},
        {"min_train_accuracy": 2.0},
        {"epochs": (4, 2)},
        {"epochs": ()},
    ],
)
def test_values_out_of_range(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match=f"knn-outlier-filter: {next(iter(wrong))}"):
        KNNOutlierFilter(**wrong)  # type: ignore[arg-type]


def test_it_judges_as_epic_does() -> None:
    logits, labels, truth = with_poison((300,) * 4, copies=2, noise=0.02)
    judged = {}
    for defense in (KNNOutlierFilter(epochs=(1,)), EPIC()):
        defense.select(1, logits, labels)
        judged[type(defense)] = defense.reports[-1].judge(truth)
    assert judged[KNNOutlierFilter].recall.rate == 1.0
    assert judged[KNNOutlierFilter].precision.rate > judged[EPIC].precision.rate
