"""The kind of cause, and the numbers behind it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unpoison._stable import margins
from unpoison.data import Examples, TensorExamples, TrainingSet
from unpoison.detectors import _cause
from unpoison.detectors._cause import Cause, Kind
from unpoison.detectors._near_duplicates import NearDuplicates

NAMES = ("cat", "dog", "ship")


def unlike(count: int) -> Tensor:
    randomness = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (count, 1, 5, 5), generator=randomness)
    return coarse.repeat_interleave(4, 2).repeat_interleave(4, 3).to(torch.uint8)


def cause_of(
    members: Tensor,
    images: Tensor | None,
    groups: Tensor | None,
    logits: Tensor,
    label: int,
    *,
    found: Kind | None,
) -> Cause:
    labels = torch.full((len(logits),), label)
    examples: Examples = TensorExamples(torch.zeros(len(logits), 3), labels)
    if images is not None:
        examples = TrainingSet(images, labels, NAMES)
    ones, none = torch.ones(len(logits)), torch.zeros(0, dtype=torch.int64)
    alike = NearDuplicates(ones, ones, none, none[:, None], groups).alike_among(examples, members)
    misfits = margins(logits)[:, label]
    return _cause.cause_of(members, alike, logits[members], misfits, label, found=found)


def logits_of(count: int, *, badly_fitted: list[int]) -> Tensor:
    """Label 1 with a lead of 10, second label 0; the given ones with a lead of 1 before label 2."""
    logits = torch.tensor([0.0, 10.0, -5.0]).repeat(count, 1) + torch.linspace(0, 1, count)[:, None] * (
        torch.tensor([0.0, 1.0, 0.0])
    )
    logits[badly_fitted] = torch.tensor([-5.0, 1.0, 0.0])
    return logits


def test_a_series_of_similar_images() -> None:
    images = unlike(100)
    images[:12] = images[:1]
    cause = cause_of(torch.arange(15), images, None, logits_of(100, badly_fitted=[]), 1, found=None)
    assert cause.kind == "near-duplicates"
    assert cause.examples == 15
    assert cause.largest_series == pytest.approx(12 / 15, abs=0.02)
    assert cause.distinct == pytest.approx(15**2 / (12**2 + 3), rel=0.05)
    assert "80% of 15 examples" in cause.describe(NAMES)


def test_known_groups_take_the_place_of_likeness() -> None:
    groups = torch.arange(100) // 10
    cause = cause_of(torch.arange(12), unlike(100), groups, logits_of(100, badly_fitted=[]), 1, found=None)
    assert cause.kind == "near-duplicates"
    assert cause.largest_series == pytest.approx(10 / 12)


def test_inputs_that_are_no_images_are_unlike_each_other() -> None:
    cause = cause_of(torch.arange(40, 52), None, None, logits_of(100, badly_fitted=[]), 1, found=None)
    assert cause.kind == "hard region"
    assert cause.distinct == 12
    assert cause.largest_series == pytest.approx(1 / 12)


def test_badly_fitted_examples_of_another_label_are_label_noise() -> None:
    wrong = [3, 40, 41, 77]
    logits = logits_of(100, badly_fitted=wrong)
    cause = cause_of(torch.tensor(wrong), unlike(100), None, logits, 1, found=None)
    assert cause.kind == "label noise"
    assert (cause.second_label, cause.second_share) == (2, 1.0)
    assert cause.margin_rank <= 0.04
    assert cause.describe(NAMES) == "Probably wrong labels: 100% of 4 badly fitted examples look like 'ship'"
    well = cause_of(torch.tensor([90, 91, 92]), unlike(100), None, logits, 1, found=None)
    assert well.kind == "hard region"
    assert well.margin_rank > 0.8


@pytest.mark.parametrize("kind", ["trigger-like", "optimised images"])
def test_what_was_found_keeps_its_kind(kind: Kind) -> None:
    members = torch.arange(20)
    logits = logits_of(100, badly_fitted=list(range(20)))
    cause = cause_of(members, unlike(100), None, logits, 1, found=kind)
    assert cause.kind == kind
    assert cause.distinct == pytest.approx(20, rel=0.1)
    assert "20 examples" in cause.describe(NAMES)
    assert Cause(**cause.to_dict()) == cause


def test_nothing_stands_out() -> None:
    cause = cause_of(torch.arange(0), unlike(5), None, logits_of(5, badly_fitted=[]), 1, found=None)
    assert (cause.kind, cause.examples, cause.second_label) == ("hard region", 0, None)
    assert "0 examples" in cause.describe(NAMES)
