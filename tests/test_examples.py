"""The scripts under examples/ run and do what they say; tests/training runs those of `ExternalTrainer`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name], capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_example_is_run_by_a_test() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.rglob("test_*.py"))
    assert not [path.name for path in EXAMPLES.rglob("*.py") if path.name not in tests]


def test_a_network_and_a_dataset_of_ones_own() -> None:
    said = run("own_model.py")
    before, after = (float(rate) for rate in re.findall(r"healing: ([\d.]+) %", said))
    assert before > 80
    assert after < 10
    assert "Poison found" in said


def test_importing_the_example_of_a_plugin_registers_it() -> None:
    code = f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import logit_neighbours; " + (
        "from unpoison import detectors; print(detectors.get('logit-neighbours', level=0.7))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "LogitNeighbours(level=0.7, batch_size=512)\n"
