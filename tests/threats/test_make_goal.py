"""Goals, triggers and classes from plain values, and what is said of those that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unpoison import attacks
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.threats import (
    Backdoor,
    LabelNoise,
    PatchTrigger,
    SelfConcealment,
    TargetedMisclassification,
    find_class,
    make_goal,
    make_trigger,
)

NAMES = ("ant", "Bee", "1", "twin", "twin")
TEST = TrainingSet(
    torch.arange(6 * 3 * 8 * 8).reshape(6, 3, 8, 8).to(torch.uint8),
    torch.tensor([0, 1, 2, 0, 1, 2]),
    NAMES,
    "six images",
)
OPTIONS = {"target": "--target", "source": "--source", "test_indices": "--target-image", "kind": "--goal"}


def goal(attack: str, kind: str | None = None, **values: Any) -> Any:
    return make_goal(
        attacks.describe(attack).goals,
        kind,
        class_names=NAMES,
        **{"test_set": TEST, "options": OPTIONS, **values},
    )


def test_a_class_has_a_name_or_a_number() -> None:
    assert [find_class(one, NAMES) for one in ("ant", "bee", "BEE", "0", 0, 4)] == [0, 1, 1, 0, 0, 4]
    assert find_class("1", NAMES) == 2  # a name goes before a number
    assert find_class(1, NAMES) == 1
    for wrong, message in (
        ("cow", r"--target cow: no such class; give a name \(ant, Bee, 1, twin, twin\) or a number 0\.\.4"),
        ("5", r"--target 5: no such class"),
        (-1, r"--target -1: no such class"),
        (True, r"--target True: no such class"),
        ("twin", r"--target twin: the classes \[3, 4\] all have this name; give the number"),
    ):
        with pytest.raises(InputError, match=message):
            find_class(wrong, NAMES, option="--target")


def test_a_trigger_has_a_name_or_a_file(tmp_path: Path) -> None:
    images = torch.full((1, 3, 8, 8), 9, dtype=torch.uint8)
    for name, trigger in (
        ("white-corner", PatchTrigger.white_corner()),
        ("four-pixels", PatchTrigger.four_pixels()),
        ("four-white-pixels", PatchTrigger.four_pixels(value=255)),
    ):
        assert torch.equal(make_trigger(name).stamp(images), trigger.stamp(images))
    assert make_trigger(trigger) is trigger
    Image.fromarray(np.full((2, 3, 3), 200, np.uint8)).save(tmp_path / "patch.png")
    stamped = make_trigger(str(tmp_path / "patch.png")).stamp(images)
    assert bool((stamped[:, :, -2:, -3:] == 200).all())
    assert int((stamped != 9).sum()) == 3 * 2 * 3
    with pytest.raises(InputError, match=r"--trigger magic: neither .*white-corner.* nor an image file"):
        make_trigger("magic", option="--trigger")


def test_the_kind_follows_from_what_is_given() -> None:
    backdoor = goal("badnets", source="ant", target="bee")
    assert isinstance(backdoor, Backdoor)
    assert (backdoor.source, backdoor.target, backdoor.trigger.kind) == (0, 1, "patch")
    everyone = goal("badnets", target="bee", trigger="four-pixels")
    assert (everyone.source, everyone.trigger.name) == (None, "four black pixels")
    assert goal("label-flip", source="ant", target=2) == LabelNoise(0, 2)
    assert goal("label-flip", source="ant") == LabelNoise(0)
    for attack in ("metapoison", "gradient-matching"):
        targeted = goal(attack, target="bee", test_indices=[0, 3])
        assert isinstance(targeted, TargetedMisclassification)
        assert (targeted.true_label, targeted.target, targeted.test_indices) == (0, 1, (0, 3))
    concealed = goal("metapoison", test_indices=[1, 4], source="bee")
    assert isinstance(concealed, SelfConcealment)
    assert (concealed.true_label, concealed.test_indices) == (1, (1, 4))
    assert goal("metapoison", "self-concealment", test_indices=[2]).true_label == 2


@pytest.mark.parametrize(
    ("attack", "kind", "values", "message"),
    [
        ("badnets", None, {}, "--target: the goal 'backdoor' needs it"),
        (
            "badnets",
            None,
            {"target": 1, "test_indices": [0]},
            "--target-image: .*'backdoor' has no use",
        ),
        ("label-flip", None, {"target": 1}, "--source: the goal 'label-noise' needs it"),
        (
            "label-flip",
            None,
            {"source": 1, "trigger": "four-pixels"},
            "trigger: .*'label-noise' has no use",
        ),
        ("gradient-matching", None, {"target": 1}, "--target-image: .*'targeted-misclassification' needs it"),
        ("metapoison", None, {"target": 1}, "--target-image: .*'targeted-misclassification' needs it"),
        (
            "metapoison",
            "self-concealment",
            {"target": 1, "test_indices": [0]},
            "--target: .* has no use",
        ),
        ("metapoison", "backdoor", {"target": 1}, "--goal backdoor: there are self-concealment, targeted"),
        ("metapoison", "self-conceal", {}, "--goal self-conceal: did you mean 'self-concealment'"),
        (
            "metapoison",
            None,
            {"target": 0, "test_indices": [0]},
            "--target ant: test image 0 is of this",
        ),
        (
            "metapoison",
            None,
            {"test_indices": [0], "source": "bee"},
            "--source Bee: .*of class ant",
        ),
        ("metapoison", None, {"test_indices": [6]}, r"--target-image: test image 6 is outside 0\.\.5"),
        ("metapoison", None, {"test_indices": [0, 1]}, r"one true label, found \[0, 1\]"),
        ("metapoison", None, {"test_indices": [0], "test_set": None}, "--target-image: there is no test set"),
        ("badnets", None, {"target": "cow"}, "--target cow: no such class"),
        ("badnets", None, {"source": 1, "target": 1}, "same class 1"),
    ],
)
def test_what_does_not_fit_is_said(
    attack: str, kind: str | None, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        goal(attack, kind, **values)
    assert "\n" not in str(error.value)
