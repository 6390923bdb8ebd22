"""`trace` with a calibration that is kept, and `repair`, on tiny data."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import load_file

from unpoison import detectors
from unpoison.cli import main
from unpoison.detectors import Calibration, Findings
from unpoison.report import ReportData, render
from unpoison.runs import run_schema
from unpoison.threats import PoisonSet
from unpoison.training import Trained

Fails = Callable[..., str]
LEVEL = ("--method", "calibrated", "--option", "false_alarm_level=0.1")


def check(record: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(run_schema()).validate(record)


@pytest.fixture
def model(story: Any, tmp_path: Path) -> Path:
    """A copy of the poisoned model, which a calibration may be kept in."""
    shutil.copytree(story.place("model"), tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "calibration", ignore_errors=True)
    return tmp_path / "model"


def test_a_calibration_is_kept_and_used_again(
    story: Any, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def trace(out: str, *more: str) -> tuple[dict[str, Any], str]:
        capsys.readouterr()
        assert main(story.trace(tmp_path / out, *LEVEL, "--model", str(model), *more)) == 0
        record = story.read(tmp_path / out)
        check(record)
        return record, capsys.readouterr().err

    first, said = trace("first")
    place = model / "calibration"
    assert f"the calibration is kept in {place}" in said
    assert Calibration.load(place).held_out
    assert "held-out" in first["results"]["calibration"]
    again, said = trace("again")
    assert f"the calibration in {place} is of this model and is used again" in said
    assert "factors" not in again["results"]["detector_seconds"]
    assert again["results"]["p_value"] == first["results"]["p_value"]
    assert again["results"]["flagged_indices"] == first["results"]["flagged_indices"]
    # Of another input, too; of other groups or another seed it is made anew.
    other, said = trace("other", "--suspect", "triggered:3", "triggered:6")
    assert "is used again" in said
    assert other["results"]["suspect"] == "test image 3 with the trigger, test image 6 with the trigger"
    (tmp_path / "groups.txt").write_text("\n".join(f"track {row // 2}" for row in range(300)))
    _, said = trace("grouped", "--groups", str(tmp_path / "groups.txt"))
    assert "is kept in" in said
    (tmp_path / "groups.json").write_text(json.dumps([row // 2 for row in range(300)]))
    _, said = trace("named", "--groups", str(tmp_path / "groups.json"))
    assert "is used again" in said
    _, said = trace("elsewhere", "--calibration", str(tmp_path / "kept"))
    assert f"kept in {tmp_path / 'kept'}" in said


def test_without_held_out_data_the_level_is_said_to_be_worth_little(
    story: Any, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from unpoison.data import load, write_npz

    write_npz(tmp_path / "alone.npz", load(story.data).train)
    poison = PoisonSet.load(Path(story.place("poison")) / "poison")
    image = poison.goal.trigger.stamp(load(story.data).test.images[:1])[0]
    from PIL import Image

    Image.fromarray(image[0].numpy()).save(tmp_path / "suspect.png")
    arguments = story.trace(tmp_path / "out", *LEVEL, "--model", str(model))
    arguments[arguments.index("--data") + 1] = str(tmp_path / "alone.npz")
    arguments[arguments.index("--suspect") + 1] = str(tmp_path / "suspect.png")
    assert main(arguments) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "without labelled held-out data the level hardly holds" in said
    assert "The true label is not given" in said
    assert "training set" in story.read(tmp_path / "out")["results"]["calibration"]


@pytest.mark.usefixtures("corner_detector")
@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--groups", "gone.txt"), "--groups: is for detectors that calibrate, which corner does not"),
        (("--calibration", "kept"), "--calibration: is for detectors that calibrate, which corner does not"),
        ((*LEVEL, "--groups", "gone.txt"), "--groups gone.txt: cannot be read"),
        ((*LEVEL, "--groups", "few.txt"), "one name for each of the 300 training examples, found 2"),
        ((*LEVEL, "--calibration", "."), "--calibration .: exists and holds no calibration"),
        (("--suspect", "triggered:0", "triggered:1"), "--suspect triggered:0 triggered:1: "),
    ],
)
def test_what_is_refused(
    more: tuple[str, ...],
    said: str,
    story: Any,
    fails: Fails,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.txt").write_text("a\nb\n")
    assert said in fails(story.trace(tmp_path / "out", *more))
    assert [path.name for path in tmp_path.iterdir()] == ["few.txt"]


@pytest.fixture
def partial_detector(corner_detector: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """`corner` blames no more than 20 examples."""
    corner: Any = detectors.METHODS.implementation("corner")
    whole = corner.find

    def find(*given: Any, **options: Any) -> Findings:
        found = whole(*given, **options)
        return dataclasses.replace(found, flagged=found.flagged[:20])

    monkeypatch.setattr(corner, "find", find)


def repair(story: Any, out: Path, *more: str) -> list[str]:
    arguments = story.trace(out, "--epochs", "4", *more)
    return ["repair", *arguments[1:]]


@pytest.mark.usefixtures("partial_detector")
def test_repair_goes_on_until_nothing_is_found(
    story: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "repaired"
    status = main(repair(story, out))
    record = story.read(out)
    check(record)
    results = record["results"]
    truth = PoisonSet.load(Path(story.place("poison")) / "poison").indices.tolist()
    assert sorted(results["removed_indices"]) == truth
    assert (results["removed"], results["removed_poison"]) == (30, 30)
    assert [one["flagged"] for one in results["rounds"]] == [20, 10, 0]
    assert [one["flagged_poison"] for one in results["rounds"]] == [20, 10, 0]
    assert results["rounds"][0]["answers"] == ["right"]
    assert results["outcome"] in ("repaired", "answer remains")
    assert status == (0 if results["outcome"] == "repaired" else 1)
    assert results["repair"] in " ".join(capsys.readouterr().out.split())
    assert Trained.load(out / "model").image_shape == (1, 12, 12)
    assert load_file(out / "removed.safetensors")["removed"].tolist() == results["removed_indices"]
    assert len(Findings.load(out / "findings")) == 300
    second = Findings.load(out / "rounds" / "2")
    examples = load_file(out / "rounds" / "2" / "examples.safetensors")["examples"]
    assert len(second) == len(examples) == 280
    assert examples[second.flagged].tolist() == results["removed_indices"][20:]
    page = render(ReportData.from_runs([out, Path(story.place("poison"))]))
    assert page.count('<tr><th scope="row">Healed, round') == 2
    assert "20, 20 of them poison" in page
    assert "Attack success, before" in page


@pytest.mark.usefixtures("partial_detector")
def test_repair_says_when_it_gives_up(story: Any, tmp_path: Path) -> None:
    assert main(repair(story, tmp_path / "out", "--rounds", "1", "--unlearner", "relabel")) == 1
    results = story.read(tmp_path / "out")["results"]
    assert results["outcome"] == "poison remains"
    assert "at least 20 of 300" in results["repair"]
    assert results["unlearner"] == "relabel"


@pytest.mark.usefixtures("corner_detector")
def test_repair_changes_nothing_where_nothing_is_found(story: Any, tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(torch.full((12, 12), 255, dtype=torch.uint8).numpy()).save(tmp_path / "suspect.png")
    arguments = [
        *("repair", "--model", story.place("clean"), "--data", story.data, "--method", "corner"),
        *("--suspect", str(tmp_path / "suspect.png"), "--out", str(tmp_path / "out")),
    ]
    assert main(arguments) == 0
    record = story.read(tmp_path / "out")
    check(record)
    assert record["results"]["outcome"] == "nothing found"
    assert record["results"]["removed"] == 0
    assert "model" not in record["artefacts"]
    assert not (tmp_path / "out" / "model").exists()


@pytest.mark.usefixtures("partial_detector")
def test_a_stopped_repair_leaves_nothing(story: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("unpoison.workflow.heal", stop)
    assert main(repair(story, tmp_path / "out")) == 130
    assert list(tmp_path.iterdir()) == []
    assert main(repair(story, tmp_path / "out", "--rounds", "0")) == 2
    assert list(tmp_path.iterdir()) == []
