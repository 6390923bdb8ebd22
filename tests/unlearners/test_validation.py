from __future__ import annotations

import pytest
import torch
from torch import nn

from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.unlearners._validation import Choice, best, held_out, judged


def make_set(labels: torch.Tensor) -> TrainingSet:
    images = torch.arange(len(labels) * 64).remainder(251).to(torch.uint8).reshape(-1, 1, 8, 8)
    return TrainingSet(images, labels, ("a", "b"), "drawn")


def test_a_share_of_each_class_is_held_out_and_no_example_is_lost() -> None:
    labels = torch.tensor([0] * 40 + [1] * 19)
    healing, validation = held_out(make_set(labels), seed=0)
    assert validation.class_counts().tolist() == [4, 1]
    assert healing.class_counts().tolist() == [36, 18]
    assert torch.equal(held_out(make_set(labels), seed=0)[1].images, validation.images)
    assert not torch.equal(held_out(make_set(labels), seed=1)[1].images, validation.images)


def test_too_few_examples_are_refused() -> None:
    with pytest.raises(InputError, match="too few examples a class"):
        held_out(make_set(torch.tensor([0, 1] * 5)), seed=0)


def choice(forget: float, kept: float) -> Choice:
    return Choice({}, forget, kept)


def test_what_forgets_most_wins_among_those_that_keep_the_accuracy() -> None:
    victim, broken = choice(1.0, 0.9), choice(0.0, 0.5)
    mild, strong, better = choice(0.6, 0.9), choice(0.2, 0.895), choice(0.2, 0.899)
    assert best([broken, mild, strong, better], victim, tolerance=0.01) is better
    assert best([broken], victim, tolerance=0.01) is victim
    assert best([mild, strong, better], victim, tolerance=0.0) is mild


def test_a_candidate_is_judged_by_both_sets() -> None:
    class Always(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.tensor([1.0, 0.0]).expand(len(images), 2)

    one = judged(Always(), make_set(torch.tensor([0, 0, 1, 1])), make_set(torch.tensor([0, 0, 0, 1])))
    assert (one.forget, one.kept) == (0.5, 0.75)
