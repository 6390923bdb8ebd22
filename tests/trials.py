"""A trial of a recipe, as the tests that show results change it."""

from __future__ import annotations

from typing import Any

from unpoison.evaluation._results import _KEYED

TRIAL: dict[str, Any] = {
    **dict.fromkeys(_KEYED.names),
    "key": "0" * 32,
    "attack": "badnets",
    "budget": 0.02,
    "source": "left",
    "target": "right",
    "test_indices": [],
    "seed": 0,
    "victim": "default",
    "number": 0,
    "observation": 0,
    "defense": "none",
    "detector": "none",
    "unlearner": "none",
    "control": "no defense",
    "poisons": 10,
    "poison_share": 0.02,
    "clean_correct": 80,
    "clean_total": 100,
    "attack_successes": 30,
    "attack_total": 40,
    "class_names": ["left", "right"],
    "class_correct": [50, 30],
    "class_total": [50, 50],
}
