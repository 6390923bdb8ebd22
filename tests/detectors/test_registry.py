"""The declarations of the detectors: complete, true, and read without torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from unpoison import detectors
from unpoison.errors import InputError


@pytest.mark.parametrize("name", detectors.names())
def test_declarations_are_complete_and_true(name: str) -> None:
    method = detectors.describe(name)
    assert method.name == name
    assert all((method.title, method.summary, method.paper, method.cost))
    assert method.summary.endswith(".")
    json.dumps(method.to_dict())
    for preset in method.presets:
        assert type(detectors.get(name, preset=preset)).__module__ == detectors.METHODS.module(name)
    assert detectors.get(name) == detectors.get(name, preset=method.presets[0])
    with pytest.raises(InputError, match=f"{name}: there is no preset 'nosuch'"):
        detectors.get(name, preset="nosuch")


def test_options_are_for_the_detectors_that_have_them() -> None:
    with pytest.raises(InputError, match="deep-knn: there is no option 'false_alarm_level'"):
        detectors.get("deep-knn", false_alarm_level=0.2)
    with pytest.raises(InputError, match="there is no detector 'nosuch'"):
        detectors.describe("nosuch")


def test_declarations_are_read_without_torch() -> None:
    check = (
        "from unpoison import detectors; detectors.describe(detectors.names()[0]); "
        "import sys; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
