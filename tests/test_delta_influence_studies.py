"""The studies of Delta-Influence: every one of them runs, resumes, and comes to the right numbers."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from unpoison import detectors
from unpoison.attacks import BadNets
from unpoison.data import TrainingSet
from unpoison.detectors import DeltaInfluence, NullDistribution, Observation, Votes
from unpoison.models import build
from unpoison.threats import Backdoor, Budget, PatchTrigger
from unpoison.training import Recipe

ROOT = Path(__file__).parents[1]
RECIPE = Recipe(model="convnet", width=4, epochs=6, batch_size=32, learning_rate=0.1)


@pytest.fixture(scope="module")
def studies() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield importlib.import_module("benchmarks.delta_influence_studies")


def some_set(n: int, *, seed: int) -> TrainingSet:
    """Three classes that differ in brightness."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    images = torch.randint(0, 60, (n, 1, 8, 8), generator=generator) + 60 * labels[:, None, None, None]
    return TrainingSet(images.to(torch.uint8), labels, ("a", "b", "c"))


@pytest.fixture(scope="module")
def scene(studies: ModuleType) -> Any:
    clean = some_set(90, seed=0)
    goal = Backdoor(PatchTrigger.white_corner(), 0, 2)
    return studies.Scene(
        attack="badnets",
        number=0,
        words="a → c",
        clean=clean,
        test=some_set(30, seed=1),
        recipe=RECIPE,
        poison=BadNets().craft(goal, clean, budget=Budget(count=12), seed=0),
        published=replace(detectors.get("delta-influence", preset="published"), draws=4, rule=Votes(0.0, 1)),
        train_seed=1000,
        heal_seed=1001,
    )


@pytest.fixture(scope="module")
def settings(studies: ModuleType) -> Any:
    calibrated = DeltaInfluence(rule=NullDistribution(false_alarm_level=0.4), draws=2)
    return studies.Settings(calibrated=calibrated, draws=(2,), observations=(1, 2), shares=(0.5,))


def test_every_study_runs_once_and_is_told_of(
    studies: ModuleType, scene: Any, settings: Any, tmp_path: Path
) -> None:
    pieces = [("badnets", study, 0) for study in studies.STUDIES]

    def made(attack: str, number: int) -> Any:
        return scene

    def never(attack: str, number: int) -> Any:
        raise AssertionError("the pieces are there")

    assert studies.work(tmp_path, pieces, scene=made, settings=settings, minutes=-1) == len(pieces)
    assert not list(tmp_path.iterdir())
    assert studies.work(tmp_path, pieces, scene=made, settings=settings) == 0
    assert studies.work(tmp_path, pieces, scene=never, settings=settings) == 0
    rows, seconds = studies.kept(tmp_path)
    assert len(seconds) == len(pieces)
    lines = json.loads(json.dumps(studies.summary(rows), allow_nan=False))
    for study in studies.STUDIES:
        assert len(lines[study]) >= 1
        assert len(studies.table(lines[study], study).splitlines()) == 2 + len(lines[study])

    of = {(study, one["detector"], one["setting"]): one for study, own in lines.items() for one in own}
    # What is detected and what is not are all of the poison.
    for name in ("calibrated", "published"):
        detected = of["complement", name, "without the detected poison"]
        undetected = of["complement", name, "without the undetected poison"]
        assert detected["removed"] + undetected["removed"] == 12
        assert detected["removed"] == detected["caught"]
        assert of["changes", name, "both"]["flagged"] == detected["flagged"]
    assert of["complement", "none", "no poison"]["removed"] == 12
    assert of["known", "calibrated", "50 %"]["poisons"] == 6
    assert of["observations", "published", "1"]["trials"] == 2
    assert of["observations", "published", "2"]["trials"] == 1


def test_draws_change_the_image_or_the_label_alone(studies: ModuleType) -> None:
    training_set = some_set(30, seed=0)
    model = build("convnet", num_classes=3, in_channels=1, image_size=(8, 8), width=4, seed=0)
    image = training_set.images[0]
    answer = int(model.eval()(image[None].float() / 255).argmax())
    detector = DeltaInfluence(rule=Votes(0.0, 1), draws=12)

    def drawn(what: str) -> tuple[set[int], torch.Tensor, set[str]]:
        with studies.changing(what, grey=True):
            findings = detector.find(model, training_set, Observation(image, answer))
        assert findings.draw_images is not None
        changed = (findings.draw_images != image).flatten(1).any(1)
        return {draw.label for draw in findings.draws}, changed, {draw.name for draw in findings.draws}

    labels, changed, names = drawn("both")
    assert answer not in labels
    assert changed.any()
    assert "colour switch" in names
    labels, changed, _ = drawn("label")
    assert answer not in labels
    assert not changed.any()
    labels, changed, names = drawn("image")
    assert labels == {answer}
    assert changed.all()
    assert "colour switch" not in names
    labels, changed, _ = drawn("both")  # all is as it was
    assert answer not in labels
    assert changed.any()


def test_the_tolerance_of_votes_goes_with_the_draws(studies: ModuleType) -> None:
    published = detectors.get("delta-influence", preset="published")
    assert studies.with_draws(published, 25).rule == Votes(0.0, 1)
    assert studies.with_draws(published, 50) == published
    assert studies.with_draws(published, 1).rule == Votes(0.0, 0)


def test_the_page_shows_what_is_kept(studies: ModuleType) -> None:
    page = (ROOT / "docs/delta_influence.md").read_text(encoding="utf-8")
    record = json.loads(studies.RESULTS.read_text(encoding="utf-8"))
    missing = [study for study in studies.STUDIES if studies.table(record[study], study) not in page]
    assert not missing


def test_the_recipe_of_gradient_matching_is_what_the_studies_read(studies: ModuleType) -> None:
    experiment = studies.Experiment.read(studies.MATCHING)
    assert len(experiment.targets.images) >= 3
    assert experiment.attacks[0].name == "gradient-matching"
    assert experiment.pretraining.rows[1] <= experiment.data.rows[0]
