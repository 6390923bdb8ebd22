"""Recipes: published numbers, closed forms of the schedules, bad values."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from unpoison.errors import InputError
from unpoison.training import Recipe


def test_reading_a_recipe_does_not_import_torch() -> None:
    code = (
        "import sys; from unpoison.training import Recipe; assert Recipe(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_presets_carry_the_published_numbers() -> None:
    conservative = Recipe.preset("resnet18-40")
    assert (conservative.epochs, conservative.batch_size, conservative.learning_rate) == (40, 128, 0.1)
    assert (conservative.momentum, conservative.nesterov, conservative.weight_decay) == (0.9, True, 5e-4)
    assert conservative.milestones == (14, 24, 35)
    assert (conservative.flip, conservative.crop_padding, conservative.gamma) == (True, 4, 0.1)
    long = Recipe.preset("resnet18-200")
    assert (long.epochs, long.milestones, long.decay_norm_and_bias) == (200, (100, 150), False)
    assert all(Recipe.preset(name).model in ("resnet18",) for name in ("resnet18-40", "resnet18-200"))


@pytest.mark.parametrize("name", Recipe.presets())
def test_presets_survive_a_round_trip(name: str) -> None:
    recipe = Recipe.preset(name)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_dict(recipe.to_dict()).fingerprint == recipe.fingerprint


def test_the_fingerprint_tells_recipes_apart_and_one_from_one_point_zero_not() -> None:
    assert Recipe(epochs=3).fingerprint != Recipe(epochs=4).fingerprint
    assert Recipe(learning_rate=1).fingerprint == Recipe(learning_rate=1.0).fingerprint


def test_schedules_follow_their_closed_forms() -> None:
    steps = Recipe(epochs=10, learning_rate=1.0, schedule="multistep", milestones=(4, 8), gamma=0.1)
    assert [steps.learning_rate_at(at) for at in (0, 3.99, 4, 7.5, 8, 9.9)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )
    cosine = Recipe(epochs=12, learning_rate=2.0, schedule="cosine", warmup_epochs=2)
    for at in (2, 5.5, 9, 12):
        assert cosine.learning_rate_at(at) == pytest.approx(1 + math.cos(math.pi * (at - 2) / 10))
    assert cosine.learning_rate_at(1) == 1.0
    cycle = Recipe(epochs=10, learning_rate=1.0, schedule="one-cycle", warmup_epochs=2.5)
    assert [cycle.learning_rate_at(at) for at in (1.25, 2.5, 6.25, 10)] == pytest.approx([0.5, 1, 0.5, 0])
    assert Recipe(epochs=3, learning_rate=0.3).learning_rate_at(2.9) == 0.3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, r"epochs must be a whole number in \[1, 100000\], found 0"),
        ({"epochs": 2.5}, "epochs must be a whole number"),
        ({"batch_size": True}, "batch_size must be a whole number"),
        ({"learning_rate": -1}, "learning_rate must be a number"),
        ({"learning_rate": math.nan}, "learning_rate must be a number"),
        ({"learning_rate": "0.1"}, "learning_rate must be a number"),
        ({"momentum": 1.0}, r"momentum must be a number in \[0, 1\), found 1.0"),
        ({"momentum": 0}, "nesterov needs momentum"),
        ({"label_smoothing": 1.5}, "label_smoothing"),
        ({"schedule": "linear"}, "schedule must be one of 'constant', 'multistep'"),
        ({"precision": "half"}, "precision must be one of 'float32', 'bfloat16'"),
        ({"milestones": [5, 3]}, r"milestones must be ascending whole numbers in 1..39, found \[5, 3\]"),
        ({"milestones": [40]}, "milestones"),
        ({"milestones": ["3"]}, "milestones must be a list, each entry a whole number"),
        ({"warmup_epochs": 41}, r"warmup_epochs must be a number in \[0, 40\], found 41"),
        ({"flip": 1}, "flip must be true or false, found 1"),
        ({"model": "resnet-9"}, "did you mean"),
        ({"learning_rat": 1}, "unknown field 'learning_rat'; did you mean 'learning_rate'"),
    ],
)
def test_bad_values_are_named_with_what_is_allowed(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Recipe.from_dict(changes)
    assert "\n" not in str(caught.value)


def test_an_unknown_preset_lists_the_known() -> None:
    with pytest.raises(InputError, match="resnet18-40"):
        Recipe.preset("resnet")
