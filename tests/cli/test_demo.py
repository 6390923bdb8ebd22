from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from unpoison import data
from unpoison.cli import _demo, main
from unpoison.detectors import Findings
from unpoison.runs import run_schema
from unpoison.threats import Budget, PoisonSet
from unpoison.training import Recipe, Trained


@pytest.fixture
def tiny(story: Any, corner_detector: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The story on tiny data, which has two classes of the same names."""
    loaded = data.load(story.data)
    names = ("Sneaker", "Shirt", "Pullover")
    assert loaded.test is not None
    splits = data.Splits(
        dataclasses.replace(loaded.train, class_names=names),
        dataclasses.replace(loaded.test, class_names=names),
    )
    play = functools.partial(
        _demo.play,
        recipe=Recipe.preset("sample", model="resnet9", width=4, epochs=6, warmup_epochs=1, flip=False),
        splits=splits,
        budget=Budget(count=30),
        method="corner",
    )
    monkeypatch.setattr(_demo, "play", play)


@pytest.mark.usefixtures("tiny")
def test_demo_keeps_all_of_the_story(tmp_path: Path, story: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 0
    said = capsys.readouterr()
    assert "never poisoned" in said.out
    assert str(tmp_path / "demo" / "report.html") in said.out.replace("\n", "")
    record = story.read(tmp_path / "demo")
    jsonschema.Draft202012Validator(run_schema()).validate(record)
    results, artefacts = record["results"], record["artefacts"]
    assert results["flagged"] == 30
    assert results["precision"] == results["recall"] == 1
    assert results["attack_success_before"] > results["attack_success_after"]
    assert {"craft", "train", "control", "trace", "heal", "measure", "report", "total"} <= set(
        record["seconds"]
    )
    poison = PoisonSet.load(tmp_path / "demo" / artefacts["poison"])
    assert results["flagged_indices"] == poison.indices.tolist()
    Findings.load(tmp_path / "demo" / artefacts["findings"])
    fingerprints = {
        name: Trained.load(tmp_path / "demo" / artefacts[name]).training_fingerprint
        for name in ("model", "control", "healed")
    }
    assert len(set(fingerprints.values())) == 3
    page = (tmp_path / "demo" / artefacts["report"]).read_text()
    assert ".partial" not in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo"]


@pytest.mark.usefixtures("tiny")
def test_demo_prints_its_record(tmp_path: Path, story: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(tmp_path / "demo"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == story.read(tmp_path / "demo")
