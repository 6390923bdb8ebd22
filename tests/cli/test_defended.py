"""`train --defense` and `craft` of attacks on single images, on tiny data."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from unpoison.cli import main
from unpoison.cli._console import per_cent
from unpoison.runs import run_schema
from unpoison.threats import PoisonSet, TargetedMisclassification
from unpoison.training import Trained

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))
from fake_matching import fake_matching

Fails = Callable[..., str]


def read(story: Any, place: Path) -> dict[str, Any]:
    record: dict[str, Any] = story.read(place)
    jsonschema.Draft202012Validator(run_schema()).validate(record)
    return record


def test_train_with_a_defense(story: Any, tmp_path: Path) -> None:
    drop = ("--defense", "random-drop", "--option", "sizes=[[1, 50]]")
    assert main(story.train(tmp_path / "out", "--poison", story.place("poison"), *drop)) == 0
    results = read(story, tmp_path / "out")["results"]
    trained = Trained.load(tmp_path / "out" / "model")
    poison = PoisonSet.load(Path(story.place("poison")) / "poison")
    assert results["dropped"] == len(trained.dropped) == 50
    assert results["dropped_poisons"] == int(poison.membership(300)[trained.dropped].sum())
    assert results["defense"]["name"].startswith("RandomDrop(sizes=((1, 50),)")
    assert main(story.train(tmp_path / "clean", *drop)) == 0
    assert read(story, tmp_path / "clean")["results"]["dropped_poisons"] is None


def test_train_tells_the_certified_accuracy_of_a_vote(
    story: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    dpa = ("--defense", "dpa", "--option", "partitions=3", "--epochs", "8")
    assert main(story.train(tmp_path / "out", *dpa)) == 0
    results = read(story, tmp_path / "out")["results"]
    curve = results["certified"]
    assert curve[0] == results["measured"]["clean_accuracy"]
    told = [f"{per_cent(curve[most]['rate'])} against {most}" for most in (1, 2) if most < len(curve)]
    assert told
    assert f"certified accuracy {', '.join(told)} changed examples\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--defense", "epix"), "there is no defense 'epix'"),
        (("--preset", "x"), "name the --defense that they are for"),
        (("--option", "x=1"), "name the --defense that they are for"),
        (("--defense", "epic", "--preset", "x"), "epic: there is no preset 'x'"),
        (("--defense", "epic", "--option", "warmup=1"), "did you mean 'warm_up'?"),
        (("--defense", "epic", "--option", "warm_up"), "expected KEY=VALUE"),
        (("--defense", "epic", "--option", "seed=3"), "epic: there is no option 'seed'"),
        (("--defense", "epic", "--option", "subset_size=abc"), "epic: "),
    ],
)
def test_train_refuses(more: tuple[str, ...], said: str, story: Any, fails: Fails, tmp_path: Path) -> None:
    assert said in fails(story.train(tmp_path / "out", *more))


def craft(story: Any, out: Path, *more: str) -> list[str]:
    network = () if "--surrogate" in more else ("--model", "resnet9", "--width", "4", "--epochs", "1")
    return [
        *("craft", "fake-matching", "--data", story.data, "--target", "right", "--budget-count", "5"),
        *("--out", str(out), *network, *more),
    ]


def test_craft_trains_or_takes_surrogates(
    story: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_matching(monkeypatch)
    image = ("--target-image", "test:3")
    assert main(craft(story, tmp_path / "own", *image)) == 0
    results = read(story, tmp_path / "own")["results"]
    assert (results["source"], results["target"], results["surrogates"]) == ("left", "right", 1)
    goal = PoisonSet.load(tmp_path / "own" / "poison").goal
    assert isinstance(goal, TargetedMisclassification)
    assert (goal.true_label, goal.target) == (0, 2)
    assert main(craft(story, tmp_path / "two", *image, "--surrogates", "2")) == 0
    assert read(story, tmp_path / "two")["results"]["surrogates"] == 2
    given = ("--surrogate", story.place("clean"), story.place("model"))
    assert main(craft(story, tmp_path / "given", *image, *given)) == 0
    assert read(story, tmp_path / "given")["results"]["surrogates"] == 2


def test_craft_refuses(story: Any, monkeypatch: pytest.MonkeyPatch, fails: Fails, tmp_path: Path) -> None:
    fake_matching(monkeypatch)
    out, image = tmp_path / "out", ("--target-image", "test:3")
    assert "--target-image: the goal 'targeted-misclassification' needs it" in fails(craft(story, out))
    assert "expected test:INDEX with an index 0..59" in fails(craft(story, out, "--target-image", "test:60"))
    assert "test image 3 is of class left" in fails(craft(story, out, *image, "--source", "middle"))
    assert "--surrogates 0: must be at least 1" in fails(craft(story, out, *image, "--surrogates", "0"))
    both = ("--surrogates", "1", "--surrogate", story.place("clean"))
    assert "or say how many to train" in fails(craft(story, out, *image, *both))
    assert "there is no option 'eps'; there are none" in fails(craft(story, out, *image, "--option", "eps=1"))
    assert "the goal 'backdoor' has no use for it" in fails(story.craft(out, *image))
    assert "crafts without a network" in fails(story.craft(out, "--surrogates", "1"))
