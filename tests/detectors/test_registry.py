"""The cards of the detectors: complete, true, and read without torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from unpoison import detectors
from unpoison.errors import InputError


@pytest.mark.parametrize("name", detectors.names())
def test_cards_are_complete_and_true(name: str) -> None:
    card = detectors.describe(name)
    assert card.name == name
    assert all(card.to_dict().values()) or not card.needs_observation
    assert card.summary.endswith(".")
    json.dumps(card.to_dict())
    for preset in card.presets:
        made = detectors.get(name, preset=preset, seed=4)
        assert getattr(made, "seed", 4) == 4
        assert type(made).__module__ == card.implementation.partition(":")[0]
    assert detectors.get(name) == detectors.get(name, preset=card.presets[0])
    with pytest.raises(InputError, match=f"{name}: no preset is called 'nosuch'"):
        detectors.get(name, preset="nosuch")


def test_a_false_alarm_level_is_for_those_that_have_one() -> None:
    made = detectors.get("delta-influence", false_alarm_level=0.2)
    assert made.rule.false_alarm_level == 0.2  # type: ignore[attr-defined]
    with pytest.raises(
        InputError, match="deep-knn, original: has no false alarm level; 'calibrated' has one"
    ):
        detectors.get("deep-knn", false_alarm_level=0.2)
    with pytest.raises(InputError, match="no detector is called 'nosuch'"):
        detectors.describe("nosuch")


def test_cards_are_read_without_torch() -> None:
    check = (
        "from unpoison import detectors; detectors.describe(detectors.names()[0]); "
        "import sys; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
