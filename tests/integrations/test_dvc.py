"""The pipeline of examples/dvc in a real DVC, where that is installed: `make compat`."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from unpoison.cli import main
from unpoison.data import encode_png

EXAMPLE = Path(__file__).parents[2] / "examples" / "dvc" / "dvc.yaml"

if find_spec("dvc"):

    @pytest.fixture
    def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Photographs, a model, and the example, in a repository of DVC; its commands find `unpoison`."""
        generator = torch.Generator().manual_seed(0)
        for number in range(24):
            place = tmp_path / "photos" / ("dark", "light")[number % 2] / f"{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            image = torch.randint(0, 128, (3, 8, 8), generator=generator, dtype=torch.uint8)
            place.write_bytes(encode_png(image + 120 * (number % 2)))
        command = tmp_path / "bin" / "unpoison"
        command.parent.mkdir()
        command.write_text(
            f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m unpoison "$@"\n', encoding="utf-8"
        )
        command.chmod(0o755)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(one for one in sys.path if one))
        monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
        small = ["--epochs", "1", "--width", "4", "--batch-size", "8"]
        assert main(["train", "--data", "photos", *small, "--out", "model"]) == 0
        shutil.copy(EXAMPLE, tmp_path)
        dvc("init", "--no-scm", "--quiet")
        return tmp_path

    def dvc(*words: str) -> str:
        """What `dvc` says."""
        done = subprocess.run(
            [sys.executable, "-m", "dvc", *words], capture_output=True, text=True, check=False, timeout=280
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def reproduced() -> list[str]:
        """The stages that `dvc repro` runs now."""
        return re.findall(r"Running stage '(\w+)'", dvc("repro"))

    def test_only_what_changed_is_run_again(repository: Path) -> None:
        assert reproduced() == ["search", "quarantine", "decide"]
        assert reproduced() == []
        photo = repository / "photos" / "dark" / "0.png"
        shutil.copy(photo, photo.with_name("extra.png"))
        assert reproduced() == ["search", "quarantine", "decide"]
        assert "dark/extra.png" in (repository / "keep.txt").read_text(encoding="utf-8")
        # What was there before is taken from the cache of DVC.
        ticket = repository / "ticket.md"
        ticket.unlink()
        assert reproduced() == []
        assert ticket.is_file()
