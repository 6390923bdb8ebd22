"""`unpoison bench` and `unpoison report STORE`: a tiny recipe through the command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from unpoison.cli import main
from unpoison.runs import RunRecord, run_schema


@pytest.fixture
def recipe(story: Any, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(
        textwrap.dedent(
            f"""
            name = "tiny"
            seeds = [0]
            [data]
            source = "{story.data}"
            [[attacks]]
            name = "badnets"
            budget = 0.1
            [targets]
            pairs = [["left", "right"]]
            [training]
            model = "resnet9"
            width = 4
            epochs = 1
            """
        )
    )
    return path


def test_a_recipe_becomes_a_store_and_leaderboards(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fails: Any
) -> None:
    out = tmp_path / "store"
    assert main(["bench", str(recipe), "--out", str(out), "--workers", "1", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    jsonschema.validate(record, run_schema())
    assert RunRecord.load(out).results["trials"] == record["results"]["planned"] == 2
    assert record["results"]["stages"] == {"cached": 0, "done": 5, "failed": 0, "damaged": 0}
    assert all((out / place).is_file() for place in record["artefacts"].values())
    kept = json.loads((out / "tiny.json").read_text())
    assert kept["table"] == record["results"]["table"]
    assert [line["control"] for line in kept["lines"]] == ["no attack", "no defense"]
    assert len((out / "bench.log").read_text().splitlines()) == 6

    assert main(["bench", str(recipe), "--out", str(out), "--workers", "1"]) == 0
    again = RunRecord.load(out)
    assert again.results["stages"]["cached"] == 5
    assert again.results["table"] == record["results"]["table"]
    assert "no defense" in capsys.readouterr().out

    assert main(["report", str(out), "--out", str(tmp_path / "board.html")]) == 0
    assert (tmp_path / "board.html").read_bytes() == (out / "tiny.html").read_bytes()
    assert main(["report", str(out), "--out", str(tmp_path / "board.tex")]) == 0
    assert (tmp_path / "board.tex").read_text().startswith("% tiny: 2 of 2 trials")
    assert "is a store of results" in fails(["report", out, recipe.parent])


def test_a_trial_that_fails_ends_in_status_1(recipe: Path, tmp_path: Path) -> None:
    # That the budget is more than the source class has is found out by crafting alone.
    recipe.write_text(recipe.read_text().replace("budget = 0.1", "budget = 0.9"))
    out = tmp_path / "store"
    assert main(["bench", str(recipe), "--out", str(out), "--workers", "1"]) == 1
    results = RunRecord.load(out).results
    assert (results["trials"], results["planned"]) == (0, 2)
    assert "a budget of 90 %" in results["failures"][0]
    assert "a budget of 90 %" in (out / "bench.log").read_text()
    assert "a budget of 90 %" in (out / "tiny.html").read_text()


def choosing(recipe: Path, changes: str, correct: int = 2) -> None:
    """Have the recipe choose its test images by its clean networks."""
    text = recipe.read_text().replace("epochs = 1", changes)
    recipe.write_text(text.replace('"right"]]', f'"right"]]\ncorrect = {correct}'))


def test_a_choice_of_targets_that_fails_ends_in_status_1(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    choosing(recipe, "epochs = 1\nlearning_rate = 1e6")
    out = tmp_path / "store"
    assert main(["bench", str(recipe), "--out", str(out), "--workers", "1"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err
    (line,) = [line for line in said.err.splitlines() if line.startswith("unpoison: error: ")]
    assert line.startswith("unpoison: error: targets.correct: a clean network could not be trained: ")
    assert line.endswith(f"{out / 'bench.log'} has more, and the same command tries again")
    assert "failed: TrainingDivergedError" in (out / "bench.log").read_text()


def test_more_targets_than_there_are_is_bad_input(recipe: Path, tmp_path: Path, fails: Any) -> None:
    choosing(recipe, "epochs = 1", correct=21)
    said = fails(["bench", recipe, "--out", tmp_path / "store", "--workers", "1"])
    assert said.endswith("of class 'left' correctly, fewer than 21")


def test_mistakes_are_one_line(recipe: Path, tmp_path: Path, fails: Any) -> None:
    assert (
        fails(["bench", recipe, "--seed", "1"])
        == "--seed: the seeds of a sweep are in its recipe; leave it out"
    )
    assert "a store is continued, never replaced" in fails(["bench", recipe, "--overwrite"])
    assert "are for --executor ray" in fails(["bench", recipe, "--gpu-share", "0.5"])
    assert "no such file; give a recipe" in fails(["bench", tmp_path / "missing.toml"])
    assert "neither empty nor a store" in fails(["bench", recipe, "--out", tmp_path])
    assert "needs at least 1" in fails(["bench", recipe, "--out", tmp_path / "new", "--workers", "0"])
    recipe.write_text(recipe.read_text().replace("budget", "bugdet"))
    assert fails(["bench", recipe]).endswith("attacks[0]: unknown key 'bugdet'; did you mean 'budget'?")


def test_stopped_in_the_middle_it_keeps_what_is_done(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(recipe.read_text().replace("epochs = 1", "epochs = 100000"))
    out = tmp_path / "store"
    command = [sys.executable, "-m", "unpoison", "bench", str(recipe), "--out", str(out), "--workers", "1"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 60
        while not list(out.glob("artefacts/*/*/poison")) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert said == ""
    assert err.splitlines()[-1].endswith("and the same command goes on from there")
    assert "Traceback" not in err
    assert list(out.glob("artefacts/*/*/poison"))
