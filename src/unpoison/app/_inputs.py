"""Inputs whose answers are looked at: the test set, test images with a known trigger, and uploads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import numpy.typing as npt
import torch

from unpoison import workflow
from unpoison.app._case import Case
from unpoison.app._shown import Shown
from unpoison.data import Inputs, TrainingSet
from unpoison.detectors import Observation, answers_of
from unpoison.errors import InputError
from unpoison.threats import TriggeredGoal


@final
@dataclass(frozen=True, eq=False)
class InputSet:
    """Inputs to look for wrong answers in.

    Arguments:
        kind: "test", or "triggered" for test images with the trigger of a known backdoor.
        title: for people.
        shown: the inputs and their right labels.
        numbers: Int64[m], their places in the test set.
    """

    kind: str
    title: str
    shown: Shown
    numbers: npt.NDArray[np.int64]

    def suspect(self, row: int) -> str:
        """What the command calls an input."""
        return f"{self.kind}:{int(self.numbers[row])}"


@final
@dataclass(frozen=True, eq=False)
class Upload:
    """An image of the user's own, with the model's answer.

    Arguments:
        path: the file; what the command calls it.
        inputs: as the model is given it.
        answer: the label.
        confidence: the probability that the model gives it.
        label: its class, where the user has said so.
    """

    path: Path
    inputs: Inputs
    answer: int
    confidence: float
    label: int | None = None


def input_sets(case: Case) -> list[InputSet]:
    """The labelled inputs of a case."""
    if case.test_set is None:
        return []
    test = case.test_set
    found = [InputSet("test", "Test set", Shown(test, case.words), np.arange(len(test)))]
    goal = None if case.poison is None else case.poison.goal
    if isinstance(goal, TriggeredGoal) and isinstance(test, TrainingSet):
        held = test.to("cpu")
        images, indices = goal.victims(held)
        labels = held.labels[indices.cpu()]
        triggered = TrainingSet(images.cpu(), labels, held.class_names, "test images with the trigger")
        found.append(
            InputSet("triggered", "Test set with the known trigger", Shown(triggered), indices.cpu().numpy())
        )
    return found


def read_upload(case: Case, path: Path) -> Upload:
    """An image file as the model is given it, with the answer.

    Raises:
        InputError: it does not decode, or is no input of this model.
    """
    if case.read_input is None or case.model is None:
        raise InputError(f"{path}: the inputs of this model are no images of files")
    inputs = Observation(case.read_input(path)).inputs
    logits = answers_of(workflow.network_of(case.model), inputs)
    confidence, answer = torch.softmax(logits.float(), 1).max(1)
    return Upload(path, inputs, int(answer), float(confidence))
