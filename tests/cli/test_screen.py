"""`unpoison screen` on the tiny story: what it writes, that its suspects can be traced, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from PIL import Image

from unpoison.cli import main
from unpoison.data import TrainingSet, load, write_npz
from unpoison.input_detectors import Screening
from unpoison.runs import run_schema

TRIGGERED = tuple(f"triggered:{index}" for index in range(0, 60, 3))


def screen(story: Any, out: Path, *inputs: str, more: tuple[str, ...] = ()) -> list[str]:
    return [
        *("screen", "--model", story.place("model"), "--data", story.data, "--poison", story.place("poison")),
        *("--reference", story.place("reference.npz"), "--inputs", *inputs, "--out", str(out), *more),
    ]


@pytest.fixture(autouse=True)
def reference(story: Any) -> None:
    """Clean images that the model was not trained on: those of the training set with other noise."""
    place = Path(story.place("reference.npz"))
    if not place.exists():
        train = load(story.data).train.subset(torch.arange(150))
        noise = torch.randint(-30, 30, train.images.shape, generator=torch.Generator().manual_seed(9))
        images = (train.images.int() + noise).clamp(0, 255).byte()
        write_npz(place, TrainingSet(images, train.labels, train.class_names, "reference"))


@pytest.mark.usefixtures("corner_detector")
def test_what_is_flagged_can_be_traced(story: Any, tmp_path: Path, capsys: Any) -> None:
    more = ("--option", "overlays=20", "--false-positive-rate", "0.3")
    assert main(screen(story, tmp_path / "out", *TRIGGERED, "test:1", more=more)) == 0
    record = story.read(tmp_path / "out")
    jsonschema.Draft202012Validator(run_schema()).validate(record)
    found = record["results"]
    screening = Screening.load(tmp_path / "out" / record["artefacts"]["screening"])
    assert found["flagged"] == len(screening.flagged) > 0
    assert found["inputs"] == len(found["screened"]) == 21
    assert set(found["suspects"]) <= set(found["flagged_inputs"]) <= {*TRIGGERED, "test:1"}
    suspect = found["suspects"][0]
    assert suspect in capsys.readouterr().out
    [answer] = [one["answer"] for one in found["screened"] if one["input"] == suspect]
    trace = [word if word != "triggered:0" else suspect for word in story.trace(tmp_path / "traced")]
    assert main(trace) == 0
    traced = story.read(tmp_path / "traced")["results"]
    assert traced["predicted"] == answer
    assert traced["poison_found"]


def test_folders_and_the_test_set_stand_for_what_they_hold(story: Any, tmp_path: Path) -> None:
    test = load(story.data).test
    assert test is not None
    (tmp_path / "in").mkdir()
    for index in range(3):
        Image.fromarray(test.images[index, 0].numpy()).save(tmp_path / "in" / f"{index}.png")
    (tmp_path / "in" / "notes.txt").write_text("no image")
    words = ("--method", "scale-up", "--fail-on-findings", "--false-positive-rate", "0.5")
    status = main(screen(story, tmp_path / "out", str(tmp_path / "in"), "test", more=words))
    found = story.read(tmp_path / "out")["results"]
    assert status == bool(found["flagged"])
    assert [one["input"] for one in found["screened"]] == [
        *(str(tmp_path / "in" / f"{index}.png") for index in range(3)),
        *(f"test:{index}" for index in range(60)),
    ]
    scores = [one["score"] for one in found["screened"]]
    assert scores[:3] == scores[3:6]
    main(screen(story, tmp_path / "alone", "test", more=words))
    assert story.read(tmp_path / "alone")["results"]["screened"] == found["screened"][3:]


def test_screen_refuses(story: Any, fails: Any, tmp_path: Path) -> None:
    def said(*inputs: str, more: tuple[str, ...] = ()) -> str:
        return str(fails(screen(story, tmp_path / "out", *inputs, more=more)))

    assert "--inputs test:60: expected test:INDEX" in said("test:60")
    (tmp_path / "empty").mkdir()
    assert "no image files in this folder" in said(str(tmp_path / "empty"))
    assert "takes 999 clean examples" in said("test:0", more=("--false-positive-rate", "0.001"))
    assert "in (0, 1)" in said("test:0", more=("--false-positive-rate", "2"))
    assert "there is no option 'overlay'" in said("test:0", more=("--option", "overlay=1"))
    assert not (tmp_path / "out").exists()


def test_screen_is_documented() -> None:
    page = Path(__file__).parents[2].joinpath("docs", "command.md").read_text(encoding="utf-8")
    section = page.split("### Results of screen\n", 1)[1].split("\n##", 1)[0]
    assert not [name for name in run_schema()["$defs"]["screen"]["properties"] if f"`{name}`" not in section]
