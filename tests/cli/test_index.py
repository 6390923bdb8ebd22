"""`unpoison index`, `trace --index` and `similar` on tiny data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from unpoison.cli import main
from unpoison.detectors import Findings
from unpoison.evaluation import LocalExecutor
from unpoison.influence import InfluenceIndex
from unpoison.runs import run_schema

LEVEL = ("--method", "calibrated", "--option", "false_alarm_level=0.1")


def build(story: Any, out: Path, *more: str) -> list[str]:
    return [
        *("index", "--model", story.place("model"), "--data", story.data, "--poison", story.place("poison")),
        *("--out", str(out), "--numbers", "100", *more),
    ]


@pytest.fixture(scope="module")
def made(story: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("made") / "index"
    assert main(build(story, place)) == 0
    return place


def test_an_index_is_made_once(
    story: Any, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = story.read(made)
    jsonschema.Draft202012Validator(run_schema()).validate(record)
    assert record["verb"] == "index"
    assert record["results"]["numbers"] == 100
    assert record["results"]["digest"] == InfluenceIndex.open(made).digest
    times = {path: path.stat().st_mtime_ns for path in made.rglob("*.safetensors")}
    assert main(build(story, made)) == 0
    assert times == {path: path.stat().st_mtime_ns for path in made.rglob("*.safetensors")}
    assert "an index of 300 examples, 100 numbers each" in capsys.readouterr().out


def test_trace_takes_it(story: Any, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = story.trace(tmp_path / "out", *LEVEL, "--index", str(made), "--refine", "50")
    assert main(trace) == 0
    findings = Findings.load(tmp_path / "out" / "findings")
    assert findings.configuration["index"]["digest"] == InfluenceIndex.open(made).digest
    assert "Read from an index of 100 numbers an example" in capsys.readouterr().out
    assert (made / "calibration" / "calibration.json").is_file()
    assert main([*trace, "--overwrite"]) == 0
    said = capsys.readouterr()
    assert f"the calibration in {made / 'calibration'} is of this model and is used again" in said.err


def test_similar_examples_are_shown(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["similar", "--index", str(made), "--examples", "17,4", "--count", "3"]
    assert main([*asked, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator(run_schema()).validate(record)
    shown = record["results"]["similar"]
    found, cosines = InfluenceIndex.open(made).similar([17, 4], count=3)
    assert [one["examples"] for one in shown] == found.tolist()
    assert shown[0]["cosines"] == pytest.approx(cosines[0].tolist())
    assert main([*asked, "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count("most similar to") == 2


def test_an_estimate_makes_nothing(story: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = build(story, tmp_path / "none", "--estimate", "--processes", "2", "--price", "3")
    assert main(asked) == 0
    said = capsys.readouterr().out
    assert main([*asked, "--json"]) == 0
    jsonschema.Draft202012Validator(run_schema()).validate(json.loads(capsys.readouterr().out))
    assert "300 examples, measured on" in said
    assert "2 processes, each with a core of its own" in said
    assert "costs" in said
    assert not (tmp_path / "none").exists()


def test_shards_are_made_by_the_executor_that_is_named(
    story: Any, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    asked: list[Any] = []

    def executor(options: Any, workers: int | None, threads: int) -> LocalExecutor:
        asked.append((options.executor, options.ray_address, options.gpu_share, workers, threads))
        return LocalExecutor(2, start="fork")

    monkeypatch.setattr("unpoison.cli._index.ray_executor", executor)
    ray = ("--executor", "ray", "--ray-address", "auto", "--gpu-share", "0.5", "--threads", "1")
    assert main(build(story, tmp_path / "index", *ray)) == 0
    assert asked == [("ray", "auto", 0.5, None, 1)]
    assert InfluenceIndex.open(tmp_path / "index").digest == InfluenceIndex.open(made).digest
    assert "are for --executor ray" in fails(build(story, tmp_path / "other", "--gpu-share", "0.5"))


def test_what_is_wrong_is_said(
    story: Any, made: Path, tmp_path: Path, fails: Callable[..., str], corner_detector: None
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "exists and holds no index" in fails(build(story, tmp_path / "full"))
    assert "100 KB" in fails(build(story, tmp_path / "new", "--memory", "100kB"))
    assert "seed 0, not 9; name another directory" in fails(build(story, made, "--seed", "9"))
    assert "no index of influences" in fails(["similar", "--index", str(tmp_path), "--examples", "1"])
    assert "no training example has this name" in fails(
        ["similar", "--index", str(made), "--examples", "cat.png"]
    )
    assert "corner reads no index" in fails(story.trace(tmp_path / "out", "--index", str(made)))
    assert "refine is for an index alone" in fails(
        story.trace(tmp_path / "out", "--method", "ek-fac", "--refine", "5")
    )


def test_an_interrupted_index_says_that_it_goes_on(
    story: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(place: Path, *given: Any, **named: Any) -> None:
        place.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr("unpoison.cli._index.workflow.index", interrupted)
    assert main(build(story, tmp_path / "index")) == 130
    assert capsys.readouterr().err.splitlines()[-1].endswith("and the same command goes on from there")
