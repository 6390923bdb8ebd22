"""The study of MetaPoison's success: all its stages on a tiny set, and that it goes on where it was."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def studies(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.metapoison_success")


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """Two classes, dark and bright, which every network tells apart."""
    draws = np.random.default_rng(0)
    labels = np.arange(48) % 2
    images = (draws.integers(0, 100, (48, 8, 8, 1)) + 150 * labels[:, None, None, None]).astype(np.uint8)
    np.savez(tmp_path / "set.npz", x_train=images, y_train=labels, x_test=images[:12], y_test=labels[:12])
    recipe = {"model": "convnet-bn", "width": 2, "epochs": 2, "batch_size": 8, "learning_rate": 0.05}
    return [
        *("--out", str(tmp_path / "study"), "--data", str(tmp_path / "set.npz")),
        *("--rows", "24", "48", "--pretraining-rows", "0", "24", "--recipe", json.dumps(recipe)),
        *("--pretraining", json.dumps({"epochs": 2, "batch_size": 8, "crop_padding": 0})),
        *("--source", "0", "--target", "1", "--targets", "1", "--choosing", "1", "--victims", "1"),
        *("--budgets", "0.1", "--surrogates", "1", "--steps", "1", "--concentrate", "2", "--eps", "16"),
        *("--others", '{"feature-collision": {"steps": 2}}'),
        *("--attacks", "metapoison", "feature-collision", "--models", "same", "same,batch_size=12"),
    ]


def test_a_study_goes_on_and_sums_up(studies: ModuleType, options: list[str]) -> None:
    study = studies.Study(studies.parse(options))
    study.run()
    lines = study.pieces.path.read_text(encoding="utf-8").splitlines()
    again = studies.Study(studies.parse(options))
    again.run()
    assert again.pieces.path.read_text(encoding="utf-8").splitlines() == lines
    summary = again.summary()
    assert [(row["attack"], row["victim"]) for row in summary["rows"]] == [
        ("feature-collision", "same"),
        ("feature-collision", "same,batch_size=12"),
        ("metapoison", "same"),
        ("metapoison", "same,batch_size=12"),
    ]
    assert {row["success"]["trials"] for row in summary["rows"]} == {1}
    assert [(row["of"], row["victim"], row["interval"]) for row in summary["ahead"]] == [
        ("feature-collision", "same", None),
        ("feature-collision", "same,batch_size=12", None),
    ]
    assert [row["victim"] for row in summary["control"]] == ["same", "same,batch_size=12"]
    assert summary["metapoison"]["start"] == "pretrained"
    margins = [piece["margin"] for key, piece in study.pieces.done.items() if key.startswith("victim/metap")]
    assert [row["margin"] for row in summary["rows"][2:]] == margins
    assert json.loads(json.dumps(summary)) == summary


def test_a_directory_keeps_to_its_study(studies: ModuleType, options: list[str]) -> None:
    studies.Study(studies.parse(options))
    studies.Study(studies.parse([*options, "--victims", "3"]))
    with pytest.raises(SystemExit, match="another eps"):
        studies.Study(studies.parse([*options, "--eps", "8"]))


def test_a_directory_keeps_to_what_it_crafts_with(
    studies: ModuleType, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    studies.Study(studies.parse(options))
    studies.Study(studies.parse([*options, "--stack", "2"]))
    # The same command line after a default has changed.
    small = studies.MetaPoison.preset

    def preset(name: str, **changes: object) -> object:
        return small(name, **(changes | {"pretraining": "shared"}))

    monkeypatch.setattr(studies.MetaPoison, "preset", preset)
    with pytest.raises(SystemExit, match="another metapoison"):
        studies.Study(studies.parse(options))


def test_a_study_grows_in_targets(studies: ModuleType, options: list[str]) -> None:
    first = studies.Study(studies.parse(options))
    first.run()
    lines = first.pieces.path.read_text(encoding="utf-8").splitlines()
    poison = first.poison("metapoison", 0.1, first.targets()[0])
    before = {path: path.stat().st_mtime_ns for path in poison.iterdir()}
    grown = studies.Study(studies.parse([*options, "--targets", "2"]))
    grown.run()
    assert grown.pieces.path.read_text(encoding="utf-8").splitlines()[: len(lines)] == lines
    assert {path: path.stat().st_mtime_ns for path in poison.iterdir()} == before
    assert {row["success"]["trials"] for row in grown.summary()["rows"]} == {2}


def test_on_a_poisoned_trajectory_each_target_is_crafted_alone(
    studies: ModuleType, options: list[str]
) -> None:
    more = ["--targets", "2", "--options", '{"trajectory": "poisoned"}', "--attacks", "metapoison"]
    study = studies.Study(studies.parse([*options, *more]))
    study.run()
    crafted = [key for key in study.pieces.done if key.startswith("craft/")]
    assert crafted == [f"craft/metapoison/0.1/{target}" for target in study.targets()]


def test_victims_start_from_the_earlier_examples(studies: ModuleType, options: list[str]) -> None:
    study = studies.Study(studies.parse(options))
    start = study.start("convnet-bn", 2)
    assert start is study.start("convnet-bn", 2)
    assert len(study.earlier) == len(study.clean) == 24
    before = torch.cat([parameter.flatten() for parameter in start.parameters()])
    network, _ = study.victim(study.clean, 0, "same,learning_rate=1e-9")
    after = torch.cat([parameter.flatten() for parameter in network.parameters()])
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


def test_the_command_names_no_place(studies: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["x", "--out", "/some/where/study", "--minutes", "5", "--budgets", "0.01", "--summary"]
    monkeypatch.setattr("sys.argv", arguments)
    assert studies.command() == "python -m benchmarks.metapoison_success --out DIR/study --budgets 0.01"


def test_attacks_are_compared_on_the_same_targets_and_seeds(studies: ModuleType) -> None:
    def pieces(**hits: str) -> list[dict[str, object]]:
        return [
            {"target": target, "seed": str(seed), "hit": hit == "x"}
            for target, marks in hits.items()
            for seed, hit in enumerate(marks)
        ]

    groups = {
        ("metapoison", 0.1, "same"): pieces(a="xx", b="x.", c="xx", d="xx"),
        # Of c there is one victim yet, of d none.
        ("gradient-matching", 0.1, "same"): pieces(a=".x", b="x.", c="."),
        ("feature-collision", 0.1, "same"): pieces(a="..", b=".x"),
        ("feature-collision", 0.2, "same"): pieces(a="..", b=".x"),
    }
    collision, matching = studies.ahead(groups)
    assert (collision["of"], collision["targets"], collision["difference"]) == ("feature-collision", 2, 0.5)
    assert (matching["of"], matching["targets"], matching["difference"]) == ("gradient-matching", 3, 0.5)
    # By hand: differences 1/2, 0 and 1, deviation 1/2, and 4.303 is Student's quantile for two degrees; no
    # difference of rates is above 1.
    assert matching["interval"] == pytest.approx([0.5 - 4.303 * 0.5 / 3**0.5, 1], abs=1e-3)
