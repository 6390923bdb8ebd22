"""A tiny data set on disk, one story of runs over it, and a detector that knows the trigger."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from unpoison import detectors
from unpoison.cli import main
from unpoison.data import TrainingSet, write_npz
from unpoison.detectors import Detector, Draw, Findings, Observation, Threshold

NAMES = ("left", "middle", "right")


def make_set(n: int, name: str, seed: int) -> TrainingSet:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    images = torch.randint(0, 60, (n, 1, 12, 12), generator=generator, dtype=torch.uint8)
    for label in range(3):
        images[labels == label, :, :, 4 * label : 4 * label + 4] += 120
    return TrainingSet(images, labels, NAMES, name)


@dataclasses.dataclass(frozen=True)
class CornerDetector(Detector):
    """Blames every example with a white corner and the predicted label; finds nothing where there is none."""

    def find(
        self,
        model: Any,
        training_set: TrainingSet,
        observation: Observation | None = None,
        *,
        reference: TrainingSet | None = None,
        seed: int = 0,
        progress: Any = None,
    ) -> Findings:
        assert observation is not None
        assert progress is not None
        progress("scores", len(training_set), len(training_set))
        images = training_set.images.cpu()
        white = (images[:, :, -3:, -3:] == 255).flatten(1).all(1)
        scores = (white & (training_set.labels.cpu() == observation.predicted)).double()
        flagged = scores.nonzero().reshape(-1)
        return Findings(
            method="corner",
            configuration={},
            fingerprint=training_set.fingerprint,
            labels=training_set.labels.cpu(),
            class_names=training_set.class_names,
            scores=scores,
            flagged=flagged,
            threshold=Threshold(0.5, "given", 0.05),
            poison_found=bool(len(flagged)),
            p_value=0.01 if len(flagged) else 0.9,
            summary=f"{len(flagged)} examples have a white corner.",
            evidence={"influence_before": scores, "influence_after": scores, "collapses": scores},
            observation=observation,
            draws=(Draw("flip", 0),),
            draw_images=observation.images.flip(-1),
            seconds={"score": 0.1},
            peak_bytes=1,
        )


@pytest.fixture
def corner_detector() -> Iterator[None]:
    """Registers the detector as `corner`, which `Story.trace` asks for, as a plug-in would."""
    detectors.register(
        name="corner",
        title="White corners",
        summary="Blames every example with a white corner and the predicted label.",
        paper="ours",
        cost="none",
        needs_observation=True,
        can_find_nothing=True,
    )(CornerDetector)
    yield
    # No other test is to see it; a registry has no way to forget a method otherwise.
    del detectors.METHODS._classes["corner"], detectors.METHODS._methods["corner"]


@dataclasses.dataclass(frozen=True)
class Story:
    """A folder with tiny.npz, and the runs `poison`, `model` and `clean` made from it."""

    folder: Path

    def place(self, name: str) -> str:
        return str(self.folder / name)

    @property
    def data(self) -> str:
        return self.place("tiny.npz")

    def craft(self, out: Path | str, *more: str) -> list[str]:
        return [
            *("craft", "badnets", "--data", self.data, "--source", "left", "--target", "right"),
            *("--out", str(out), *(more or ("--budget-count", "30"))),
        ]

    def train(self, out: Path | str, *more: str) -> list[str]:
        network = ("--model", "resnet9", "--width", "4")
        return ["train", "--data", self.data, "--out", str(out), "--epochs", "2", *network, *more]

    def trace(self, out: Path | str, *more: str) -> list[str]:
        return [
            *("trace", "--model", self.place("model"), "--data", self.data, "--poison", self.place("poison")),
            *("--suspect", "triggered:0", "--method", "corner", "--out", str(out), *more),
        ]

    def heal(self, out: Path | str, findings: Path | str, *more: str) -> list[str]:
        return [
            *("heal", "--model", self.place("model"), "--data", self.data, "--poison", self.place("poison")),
            *("--findings", str(findings), "--out", str(out), *more),
        ]

    @staticmethod
    def read(directory: Path | str) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((Path(directory) / "run.json").read_text())
        return record


@pytest.fixture(scope="session")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("story")
    write_npz(folder / "tiny.npz", make_set(300, "tiny", 0), make_set(60, "tiny test", 1))
    told = Story(folder)
    assert main(told.craft(told.place("poison"))) == 0
    assert main(told.train(told.place("model"), "--poison", told.place("poison"), "--epochs", "4")) == 0
    assert main(told.train(told.place("clean"))) == 0
    return told


Fails = Callable[[Sequence[str]], str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Run a command that must be refused; gives the one line it says."""

    def run(arguments: Sequence[str]) -> str:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        lines = [line for line in said.err.splitlines() if line.startswith("unpoison: error: ")]
        assert status == 2, said.err
        assert len(lines) == 1
        assert "Traceback" not in said.err
        assert said.out == ""
        return lines[0].removeprefix("unpoison: error: ")

    return run
