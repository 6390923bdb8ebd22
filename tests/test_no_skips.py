"""`--no-skips`, with which CI runs: a skipped test is a failure, unless it needs CUDA."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.parametrize(
    ("reason", "options", "status"),
    [
        ("no browser", ["--no-skips"], 1),
        ("no browser", ["--no-skips", "-n1"], 1),
        ("needs CUDA", ["--no-skips"], 0),
        ("no browser", [], 0),
    ],
)
def test_a_skipped_test_fails_the_run(reason: str, options: list[str], status: int, tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        f"import pytest\ndef test_one(): pass\ndef test_two(): pytest.skip({reason!r})\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "conftest", *options, "test_some.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stdout
    assert ("which --no-skips does not allow" in done.stdout) == bool(status)
