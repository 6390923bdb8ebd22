"""Arguments of another kind are refused by every verb, in one line that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import unpoison
from unpoison import attacks, defenses, detectors, unlearners
from unpoison.data import TrainingSet
from unpoison.detectors import Observation
from unpoison.errors import InputError, printable
from unpoison.threats import Backdoor, Budget, PatchTrigger
from unpoison.training import Recipe

SET = TrainingSet(
    torch.randint(0, 256, (24, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
    torch.arange(24) % 2,
    ("a", "b"),
    "drawn",
)
NETWORK = nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).eval()
RECIPE = Recipe(model="resnet9", width=2, epochs=1, batch_size=8, learning_rate=0.01)
GOAL = Backdoor(PatchTrigger.white_corner(2), source=1, target=0)
SEEN = Observation(SET.images[:1], int(NETWORK(SET.images[:1] / 255).argmax()))
VERBS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "craft": (
        unpoison.craft,
        {"attack": "badnets", "goal": GOAL, "training_set": SET, "budget": Budget(count=1)},
    ),
    "train": (unpoison.train, {"training_set": SET, "recipe": RECIPE}),
    "observe": (unpoison.observe, {"model": NETWORK, "goal": GOAL, "test_set": SET}),
    "calibrate": (unpoison.calibrate, {"model": NETWORK, "training_set": SET}),
    "trace": (
        unpoison.trace,
        {"model": NETWORK, "training_set": SET, "observation": SEEN, "method": "ek-fac"},
    ),
    "scan": (unpoison.scan, {"model": NETWORK, "training_set": SET}),
    "heal": (
        unpoison.heal,
        {
            "model": NETWORK,
            "training_set": SET,
            "findings": [0],
            "method": "fine-tune",
            "recipe": RECIPE,
        },
    ),
    "repair": (unpoison.repair, {"model": NETWORK, "training_set": SET, "observation": SEEN}),
    "measure": (unpoison.measure, {"model": NETWORK, "test_set": SET}),
}
WRONG: dict[str, tuple[Any, ...]] = {
    "goal": ("backdoor", 3),
    "budget": (0.1, None),
    "recipe": ("sample", {}),
    "poison": ("poison",),
    "model": ("net", 3, len),
    "start": ("net", 3),
    "surrogates": ("net", [None], 1.5),
    "observation": (None, [], [None], "cat.png", SET.images),
    "findings": (None, "all", ["a"], {1}, object()),
    "calibration": ("calibration",),
    "groups": (3,),
    "index": ("index",),
    "task": ("logits",),
    "include": ([True] * 24, "all"),
    "normalization": (3, "x", (None, None)),
    "retrain": (3,),
    "progress": (3,),
    "rounds": ("x", 1.5),
    "device": ("tpu", "x:y", object()),
    "memory": ("much", 0),
    "training_set": (None, 3, "set", nn.Linear(2, 2)),
    "test_set": (None, 3),
    "attack": (None, "badnet", detectors.get("ek-fac"), attacks.get),
    "defense": (3, "jpg", attacks.get("badnets")),
    "method": (None, "nothing", object(), attacks.get("badnets"), defenses.get("jpeg"), len),
}
CASES = [
    pytest.param(verb, name, value, id=f"{verb} {name} {printable(repr(value))[:20]}")
    for verb, (function, given) in VERBS.items()
    for name, values in WRONG.items()
    if name in given or name in function.__wrapped__.__kwdefaults__  # type: ignore[attr-defined]
    for value in values
]


@pytest.mark.parametrize(("verb", "name", "value"), CASES)
def test_another_kind_of_argument_is_refused_in_one_line(verb: str, name: str, value: Any) -> None:
    function, given = VERBS[verb]
    with pytest.raises(InputError) as error:
        function(**{**given, name: value})
    assert "\n" not in str(error.value)


def test_the_message_names_verb_argument_and_what_is_expected() -> None:
    with pytest.raises(InputError, match=r"^train: recipe must be a Recipe, .* found str 'sample'$"):
        unpoison.train(SET, "sample")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^heal: findings must be Findings, or a list of indices, found"):
        unpoison.heal(NETWORK, SET, "all", method="fine-tune", recipe=RECIPE)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [attacks, defenses, detectors, unlearners])
def test_a_class_in_place_of_an_instance_is_refused(kind: Any) -> None:
    one = kind.METHODS.implementation(kind.names()[0])
    verb, name = {
        attacks: ("craft", "attack"),
        defenses: ("train", "defense"),
        detectors: ("scan", "method"),
        unlearners: ("heal", "method"),
    }[kind]
    function, given = VERBS[verb]
    with pytest.raises(InputError, match="expected the name or an instance of one"):
        function(**{**given, name: one})


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="device cuda:2: PyTorch sees 2 here, from cuda:0 on"):
        unpoison.train(SET, RECIPE, device="cuda:2")
