"""`Answers`: what a model answers to labelled examples: by class, and which answers are wrong."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np
import numpy.typing as npt
import torch

from unpoison import workflow
from unpoison._statistics import Proportion
from unpoison.data import Examples
from unpoison.detectors import answers_to
from unpoison.workflow import Model

Integers = npt.NDArray[np.int64]


@final
@dataclass(frozen=True, eq=False)
class Answers:
    """The labels and the answers to m examples.

    Arguments:
        labels: Int64[m], the right ones.
        answers: Int64[m], the model's.
        confidence: Float32[m], the probability that the model gives its answer.
        classes: how many there are.
    """

    labels: Integers
    answers: Integers
    confidence: npt.NDArray[np.float32]
    classes: int

    @classmethod
    def of(cls, model: Model, examples: Examples) -> Answers:
        """Ask the model, in eval mode and batch by batch."""
        logits = answers_to(workflow.network_of(model), examples)
        confidence, answers = torch.softmax(logits.float(), 1).max(1)
        return cls(examples.labels.cpu().numpy(), answers.numpy(), confidence.numpy(), examples.num_classes)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def accuracy(self) -> Proportion:
        """The share that is right."""
        return Proportion(int((self.labels == self.answers).sum()), len(self))

    @cached_property
    def confusion(self) -> Integers:
        """Int64[classes classes]: examples by label (rows) and answer; other answers are left out."""
        known = self.answers < self.classes
        cells = self.labels[known] * self.classes + self.answers[known]
        return np.bincount(cells, minlength=self.classes**2).reshape(self.classes, self.classes)

    @property
    def by_class(self) -> tuple[Proportion, ...]:
        """The share of each class that is right."""
        totals = np.bincount(self.labels, minlength=self.classes).tolist()
        right = self.confusion.diagonal().tolist()
        return tuple(Proportion(hits, total) for hits, total in zip(right, totals, strict=True))

    def confused(self, most: int) -> list[tuple[int, int, int]]:
        """At most so many (label, answer, examples) that are wrong, the most frequent first."""
        wrong = self.confusion - np.diag(self.confusion.diagonal())
        order = np.argsort(-wrong, axis=None, kind="stable")[:most]
        rows, columns = np.unravel_index(order, wrong.shape)
        found = zip(rows.tolist(), columns.tolist(), wrong[rows, columns].tolist(), strict=True)
        return [one for one in found if one[2]]

    def wrong(self) -> Integers:
        """Int64[k]: the wrongly answered examples, the most confident answers first."""
        rows = np.flatnonzero(self.labels != self.answers)
        return rows[np.argsort(-self.confidence[rows], kind="stable")].astype(np.int64)
