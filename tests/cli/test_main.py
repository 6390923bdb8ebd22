from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unpoison.cli import main
from unpoison.cli._main import parse
from unpoison.cli._options import HELPS, VERBS, configuration

NAMES = [verb.__name__.lower() for verb in VERBS]
HEAL = ["--model", "m", "--data", "d", "--findings", "f", "--out", "o"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_help_answers_without_torch() -> None:
    code = (
        "import sys\n"
        "from unpoison.cli import main\n"
        f"for verb in {NAMES}:\n"
        "    assert main([verb, '--help']) == 0\n"
        "assert main(['--help']) == 0\n"
        "assert main(['craft', '--list']) == 0\n"
        "assert main(['train', '--epochs', 'many']) == 2\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for verb in NAMES:
        assert f"usage: unpoison {verb}" in done.stdout


def test_the_text_of_an_option_is_broken_by_the_width_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    assert main(["trace", "--help"]) == 0
    shown = capsys.readouterr().out
    for name, text in HELPS["ModelOptions"].items():
        assert text in shown, name


def test_python_dash_m_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "unpoison", "cruft"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("unpoison: error: unrecognized options: cruft")
    assert len(done.stderr.splitlines()) == 1


def test_a_missing_parser_is_one_line(monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]) -> None:
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert fails(["train"]) == "the command needs tyro, which is not installed; pip install tyro"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            [],
            "expected one of {demo, craft, train, index, trace, similar, scan, screen, heal, repair, bench,",
        ),
        (["craft"], "missing from unpoison craft: ATTACK, --data DATA, --out DIR"),
        (["train", "--data", "d", "--out", "o", "--epochs", "1.5"], "--epochs"),
        (["demo", "--sed", "3"], "--sed"),
        (
            ["heal", "--method", "pray", *["--model", "m", "--data", "d", "--findings", "f", "--out", "o"]],
            "no unlearner 'pray'",
        ),
        (["report"], "name at least one run directory"),
    ],
)
def test_usage_errors_are_one_line(arguments: list[str], said: str, fails: Callable[..., str]) -> None:
    assert said in fails(arguments)


def test_the_configuration_holds_every_option_flat() -> None:
    options = parse(["train", "--data", "sample", "--out", "o", "--width", "4", "--seed", "7"])
    values = configuration(options)
    assert values["data"] == "sample"
    assert values["out"] == "o"
    assert values["width"] == 4
    assert values["seed"] == 7
    assert values["learning_rate"] is None
    assert not any(isinstance(value, dict) for value in values.values())


def test_a_bug_is_neither_bad_input_nor_poison(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("unpoison.workflow.train", broken)
    assert main(["train", "--data", "sample", "--out", str(tmp_path / "out")]) == 70
    assert "ZeroDivisionError: by zero" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place_is_one_line(fails: Callable[..., str], story: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = fails(story.train(tmp_path / "file" / "out"))
    assert "file" in said


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_in_the_middle_nothing_is_left(
    number: signal.Signals, status: int, story: Any, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "unpoison", "train", "--data", story.data, "--out", tmp_path / "out"]
    process = subprocess.Popen(
        [*command, "--epochs", "100000", "--width", "4", "--checkpoints", tmp_path / "checkpoints"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("checkpoints/epoch-*")) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.05)
        assert list(tmp_path.glob(".out.*.partial")), "the run directory is staged beside its final name"
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == status, err
    assert out == ""
    assert err.splitlines()[-1].endswith("nothing was written")
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
