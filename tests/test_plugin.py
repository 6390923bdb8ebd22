"""A detector in a file of its own, in a scratch folder, appears everywhere without another edit."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "examples" / "logit_neighbours.py"
NAME = "logit-neighbours"


@pytest.fixture
def plugin(tmp_path: Path) -> dict[str, str]:
    """The environment of a process that has the detector."""
    shutil.copy(SOURCE, tmp_path / "my_detector.py")
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "UNPOISON_PLUGINS": "my_detector"}


def run(environment: dict[str, str], *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_it_is_one_short_file() -> None:
    assert len(SOURCE.read_text(encoding="utf-8").splitlines()) <= 60


def test_without_the_environment_variable_it_is_not_there() -> None:
    assert NAME not in run(dict(os.environ), "-m", "unpoison", "trace", "--help")


def test_the_command_lists_it(plugin: dict[str, str]) -> None:
    assert NAME in run(plugin, "-m", "unpoison", "trace", "--help")
    assert NAME not in run(plugin, "-m", "unpoison", "scan", "--help")


def test_the_documentation_lists_it(plugin: dict[str, str]) -> None:
    code = "import generated; print('\\n'.join(generated.methods('detector', 'needs_observation')))"
    plugin["PYTHONPATH"] += os.pathsep + str(ROOT / "docs" / "_ext")
    assert f"| `{NAME}`: **Logit neighbours.**" in run(plugin, "-c", code)


def test_a_recipe_runs_it_in_worker_processes(plugin: dict[str, str], tmp_path: Path) -> None:
    recipe = (ROOT / "recipes" / "smoke.toml").read_text(encoding="utf-8")
    (tmp_path / "smoke.toml").write_text(recipe.replace('"ek-fac"', f'"{NAME}"'), encoding="utf-8")
    out = tmp_path / "bench"
    run(plugin, "-m", "unpoison", "bench", str(tmp_path / "smoke.toml"), "--workers", "1", "--out", str(out))
    table = (out / "smoke.md").read_text(encoding="utf-8")
    assert f"| {NAME}" in table


def test_the_conformance_tests_cover_it(plugin: dict[str, str]) -> None:
    said = run(plugin, "-m", "pytest", "tests/conformance/test_detectors.py", "-q", "-n0", "-k", NAME)
    [passed] = re.findall(r"(\d+) passed", said)
    assert int(passed) >= 20
    assert "failed" not in said
