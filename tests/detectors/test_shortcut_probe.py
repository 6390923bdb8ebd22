"""The detector of availability poison: its level, its oracle, what it finds and what it refuses."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from unpoison.data import TrainingSet
from unpoison.detectors import ShortcutProbe
from unpoison.detectors.shortcut_probe import chance_of_so_many, margins_of
from unpoison.errors import InputError

MODEL = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))


def make_set(
    n: int, *, seed: int, shortcut: float = 0.0, share: float = 1.0, channels: int = 1
) -> TrainingSet:
    """Three classes that differ a little; with a pattern of each class on a share of the examples."""
    draws = torch.Generator().manual_seed(seed)
    patterns = torch.randn(2, 3, channels, 6, 6, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(3, (n,), generator=draws)
    images = 128 + 30 * torch.randn(n, channels, 6, 6, generator=draws) + 4 * patterns[0][labels]
    chosen = torch.rand(n, generator=draws) < share
    images += shortcut * patterns[1][labels] * chosen.view(-1, 1, 1, 1)
    return TrainingSet(images.clamp(0, 255).round().to(torch.uint8), labels, ("a", "b", "c"), "drawn")


def test_the_chance_is_what_counting_all_ways_gives() -> None:
    hits, labels = torch.tensor([1, 1, 0, 1, 0]).bool(), torch.tensor([0, 0, 0, 1, 1])
    others, other_labels = torch.tensor([0, 1, 0, 0]).bool(), torch.tensor([0, 0, 1, 1])
    # Every way to choose which of a class are the first, class by class.
    ways, as_many = 0, 0
    pools = [[int(x) for x in torch.cat((hits[labels == c], others[other_labels == c]))] for c in range(2)]
    for chosen in itertools.product(
        *(itertools.combinations(range(len(pool)), int((labels == c).sum())) for c, pool in enumerate(pools))
    ):
        ways += 1
        as_many += sum(pools[c][k] for c, part in enumerate(chosen) for k in part) >= int(hits.sum())
    assert chance_of_so_many(hits, labels, others, other_labels) == pytest.approx(as_many / ways)


def test_false_alarms_are_no_more_than_the_level() -> None:
    p_values = []
    for seed in range(60):
        whole = make_set(160, seed=seed)
        found = ShortcutProbe().find(
            MODEL, whole.subset(range(100)), reference=whole.subset(range(100, 160)), seed=seed
        )
        assert found.p_value is not None
        p_values.append(found.p_value)
        assert found.poison_found == (found.p_value <= 0.01)
    # Of 60, three below 1 % have a probability of 2 %; so have 20 below 20 %.
    assert sum(one <= 0.01 for one in p_values) <= 3
    assert sum(one <= 0.2 for one in p_values) <= 20
    assert min(p_values) < 0.5 < max(p_values)


@pytest.mark.parametrize("share", [1.0, 0.6])
def test_a_shortcut_is_found_and_scores_are_cross_fitted(share: float) -> None:
    poisoned, reference = make_set(300, seed=1, shortcut=12, share=share), make_set(150, seed=2)
    found = ShortcutProbe().find(MODEL, poisoned, reference=reference, seed=0)
    assert found.poison_found
    assert found.p_value is not None
    assert found.p_value < 1e-3
    assert "of the reference (p = " in found.summary
    clean = ShortcutProbe().find(MODEL, make_set(300, seed=1), reference=reference, seed=0)
    assert not clean.poison_found
    assert not len(clean.flagged)
    # The oracle: a model of the half without the example, fitted by stacking the penalty under the pixels.
    order = torch.randperm(300, generator=_halves(0))
    halves = (order[:150], order[150:])
    pixels = poisoned.images.flatten(1).double() / 255 - 0.5
    inputs = torch.cat((pixels, torch.ones(300, 1, dtype=torch.float64)), 1)
    targets = nn.functional.one_hot(poisoned.labels, 3).double()
    for fitted, scored in (halves, halves[::-1]):
        squares = inputs[fitted].square().sum(0)
        penalty = torch.full((37,), 0.1 * float(squares[:-1].mean()) + 1e-9, dtype=torch.float64)
        penalty[-1] = 1e-6
        stacked = torch.cat((inputs[fitted], penalty.sqrt().diag()))
        wanted = torch.cat((targets[fitted], torch.zeros(37, 3, dtype=torch.float64)))
        solution = torch.linalg.lstsq(stacked, wanted).solution
        for row in scored[:20].tolist():
            outputs = inputs[row] @ solution
            label = int(poisoned.labels[row])
            margin = outputs[label] - max(outputs[c] for c in range(3) if c != label)
            assert float(found.scores[row]) == pytest.approx(float(margin), abs=1e-6)


def _halves(seed: int) -> torch.Generator:
    from unpoison._seeds import generator

    return generator(seed, "shortcut probe", "halves")


def test_large_images_are_thinned() -> None:
    wide = make_set(200, seed=1, shortcut=12, channels=3)
    found = ShortcutProbe(dimensions=40).find(
        nn.Sequential(nn.Flatten(), nn.Linear(108, 3)), wide, reference=make_set(100, seed=2, channels=3)
    )
    thin = TrainingSet(wide.images[:, :, ::2, ::2].contiguous(), wide.labels, wide.class_names)
    same = ShortcutProbe().find(
        nn.Sequential(nn.Flatten(), nn.Linear(27, 3)),
        thin,
        reference=TrainingSet(
            make_set(100, seed=2, channels=3).images[:, :, ::2, ::2].contiguous(),
            make_set(100, seed=2, channels=3).labels,
            wide.class_names,
        ),
    )
    torch.testing.assert_close(found.scores, same.scores)
    assert found.p_value == same.p_value


def test_without_a_reference_nothing_is_judged_and_others_are_refused() -> None:
    found = ShortcutProbe().find(MODEL, make_set(60, seed=0, shortcut=20))
    assert "Cannot be judged" in found.summary
    assert not found.poison_found
    assert found.p_value is None
    with pytest.raises(InputError, match=r"a reference needs images of shape \(1, 6, 6\)"):
        ShortcutProbe().find(MODEL, make_set(60, seed=0), reference=make_set(9, seed=1, channels=3))
    with pytest.raises(InputError, match=r"a reference needs images of shape"):
        ShortcutProbe().find(MODEL, make_set(60, seed=0), reference=make_set(9, seed=1).subset([]))
    two = TrainingSet(make_set(9, seed=1).images, torch.zeros(9, dtype=torch.int64), ("a", "b"))
    with pytest.raises(InputError, match="a reference needs 3 classes, found 2"):
        ShortcutProbe().find(MODEL, make_set(60, seed=0), reference=two)
    with pytest.raises(InputError, match=r"level must be a number in \(0, 0.5\], found 0.7"):
        ShortcutProbe(level=0.7)


def test_margins() -> None:
    outputs = torch.tensor([[2.0, 5.0, 1.0], [2.0, 5.0, 1.0]])
    assert margins_of(outputs, torch.tensor([1, 0])).tolist() == [3.0, -3.0]
    assert margins_of(outputs[:, :1], torch.tensor([0, 0])).tolist() == [0.0, 0.0]
    assert math.isfinite(float(margins_of(outputs, torch.tensor([2, 2])).sum()))
