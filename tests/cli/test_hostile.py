"""Names, places and options that nobody should give: one line says what is wrong and what to do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unpoison import attacks
from unpoison.cli import main

SETTINGS = ["--model", "resnet9", "--width", "2", "--epochs", "1", "--batch-size", "8"]
NAMES = ("cat\nx", "<b>dog<", "a\u202eb")


def folder(root: Path, names: tuple[str, ...] = ("cat", "dog")) -> str:
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for number in range(6):
            pixels = np.random.RandomState(10 * label + number).randint(0, 255, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return str(root)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What is said on standard error after the lines of progress."""
    assert main([str(argument) for argument in arguments]) == 2
    output = capsys.readouterr()
    assert "Traceback" not in output.err
    said = output.err.splitlines()[-1]
    assert said.startswith("unpoison: error: ")
    assert said.isprintable()
    return said


def test_control_characters_of_names_do_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder(tmp_path / "set", NAMES)
    assert main(["train", "--data", data, *SETTINGS, "--out", str(tmp_path / "run")]) == 0
    of_model = ["--model", str(tmp_path / "run"), "--data", data]
    method = ["--method", "deep-knn", "--option", "neighbours=3"]
    assert main(["scan", *of_model, *method, "--out", str(tmp_path / "found")]) == 0
    output = capsys.readouterr()
    for text in (output.out, output.err):
        assert all(line.isprintable() for line in text.split("\n"))
    assert "cat\\nx/" in output.out
    told = refused(capsys, "export", tmp_path / "found", "--as", "list", "--out", tmp_path / "list.txt")
    assert "cannot stand in a list; write json or parquet" in told
    assert not (tmp_path / "list.txt").exists()
    assert main(["export", str(tmp_path / "found"), "--out", str(tmp_path / "rows.csv")]) == 0


@pytest.mark.parametrize("name", [one for one in attacks.names() if not attacks.describe(one).resumes])
def test_checkpoints_of_an_attack_that_keeps_none_are_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", tmp_path / "none", "--checkpoints", tmp_path / "kept", "--out", tmp_path / "out"]
    told = refused(capsys, "craft", name, *options)
    assert f"--checkpoints: {name} keeps none; leave it out" in told


def test_checkpoints_are_not_written_among_other_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder(tmp_path / "set")
    before = sorted(tmp_path.rglob("*"))
    told = refused(
        capsys, "train", "--data", data, *SETTINGS, "--checkpoints", data, "--out", tmp_path / "out"
    )
    assert "holds other things than checkpoints of a run" in told
    (tmp_path / "file").write_text("mine")
    place = tmp_path / "file"
    told = refused(
        capsys, "train", "--data", data, *SETTINGS, "--checkpoints", place, "--out", tmp_path / "out"
    )
    assert "is a file; name a directory for checkpoints" in told
    assert sorted(tmp_path.rglob("*")) == sorted([*before, place])


def test_what_is_not_there_or_of_another_kind_says_what_to_give(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "set")
    (tmp_path / "text.txt").write_text("hello")
    cases = {
        ("bench", "nosuch.toml"): "nosuch.toml: no such file; give a recipe",
        ("bench", "set"): "set: Is a directory; give a recipe",
        ("bench", "text.txt"): "give a recipe as docs/benchmarking.md describes it",
        ("report", "nosuch"): "nosuch: no such directory; give run directories",
        ("report", "text.txt"): "text.txt: is no directory; give run directories",
        ("report", "set"): "set: has no run.json; give run directories",
        ("export", "set", "--out", "rows.csv"): "give a run directory that has them",
        ("train", "--data", "", "--out", "x"): "--data: is empty; name a data set",
        ("scan", "--model", "set", "--data", "set", "--out", "x"): "give a run directory that has them",
    }
    for arguments, expected in cases.items():
        assert expected in refused(capsys, *arguments)
    assert {path.name for path in tmp_path.iterdir()} == {"set", "text.txt"}


def test_no_suspect_is_said_to_be_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = folder(tmp_path / "set")
    assert main(["train", "--data", data, *SETTINGS, "--out", str(tmp_path / "run")]) == 0
    options = ["--model", tmp_path / "run", "--data", data, "--suspect", "--out", tmp_path / "out"]
    assert "--suspect: name at least one input" in refused(capsys, "trace", *options)
