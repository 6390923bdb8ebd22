from __future__ import annotations

import pytest
import torch

from unpoison.attacks import LabelFlip
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.threats import Budget, LabelNoise


@pytest.fixture
def clean() -> TrainingSet:
    images = torch.arange(200, dtype=torch.uint8).view(200, 1, 1, 1)
    return TrainingSet(images, torch.arange(200) % 5, ("a", "b", "c", "d", "e"), "letters")


def test_pairs_are_flipped_from_the_source_to_the_target(clean: TrainingSet) -> None:
    made = LabelFlip().craft(LabelNoise(1, 3), clean, budget=Budget(share=0.1), seed=0)
    assert (set(made.clean_labels.tolist()), set(made.given_labels.tolist())) == ({1}, {3})
    assert torch.equal(made.images, clean.images[made.indices])
    assert float(made.linf.max()) == 0


def test_without_a_target_every_other_class_is_as_likely(clean: TrainingSet) -> None:
    counts = torch.zeros(5)
    for seed in range(50):
        made = LabelFlip().craft(LabelNoise(1), clean, budget=Budget(count=40), seed=seed)
        assert set(made.clean_labels.tolist()) == {1}
        counts += torch.bincount(made.given_labels, minlength=5)
    assert counts[1] == 0
    assert float(((counts[[0, 2, 3, 4]] - 500) ** 2 / 500).sum()) < 16.3  # chi-squared, 3 degrees, 0.1 %


def test_flips_everywhere_touch_all_classes(clean: TrainingSet) -> None:
    made = LabelFlip(everywhere=True).craft(LabelNoise(1), clean, budget=Budget(share=0.4), seed=0)
    assert len(made) == 80
    assert set(made.clean_labels.tolist()) == set(made.given_labels.tolist()) == set(range(5))
    assert bool((made.clean_labels != made.given_labels).all())


def test_nonsense_is_refused(clean: TrainingSet) -> None:
    with pytest.raises(InputError, match=r"flips everywhere have no target; give LabelNoise\(1\)"):
        LabelFlip(everywhere=True).craft(LabelNoise(1, 2), clean, budget=Budget(count=1), seed=0)
    with pytest.raises(InputError, match=r"more than the 40 examples of class 1 \(b\); at most 40 fit"):
        LabelFlip().craft(LabelNoise(1), clean, budget=Budget(count=41), seed=0)
