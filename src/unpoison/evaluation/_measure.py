"""`measure`: what a model gets right on clean test images, and how often the adversary gets their way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn

from unpoison._statistics import Proportion
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.threats import Goal
from unpoison.training import Trained, predict


@final
@dataclass(frozen=True)
class Measurement:
    """Accuracy on clean test images, in all and by class; success of the attack if there is a goal."""

    clean_accuracy: Proportion
    per_class: tuple[Proportion, ...]
    attack_success: Proportion | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON; a class without test images has the rate None."""
        return {
            "clean_accuracy": self.clean_accuracy.to_dict(),
            "per_class": [proportion.to_dict() for proportion in self.per_class],
            "attack_success": None if self.attack_success is None else self.attack_success.to_dict(),
        }


def measure(
    model: Trained | nn.Module, test_set: TrainingSet, goal: Goal | None = None, *, batch_size: int = 512
) -> Measurement:
    """How good the model is, and how well the attack works, on 8-bit test images with the model in eval mode.

    Arguments:
        model: left as it was; float images in [0, 1] in, logits out.
        test_set: clean images, none of which was trained on.
        goal: what the adversary wants; None for a model of which nobody knows of an attack.
        batch_size: how many images at a time, which bounds memory.

    Raises:
        InputError: the test set is empty, the model has fewer outputs than the set has classes, or the goal
            finds no victims in it.
    """
    if not len(test_set):
        raise InputError(f"{test_set.name}: no test images to measure on")
    network = model.model if isinstance(model, Trained) else model
    logits = predict(network, test_set.images, batch_size=batch_size)
    if logits.ndim != 2 or logits.shape[1] < test_set.num_classes:
        raise InputError(
            f"{test_set.name}: the model gives outputs of shape {tuple(logits.shape[1:])}, but the set has "
            f"{test_set.num_classes} classes"
        )
    labels = test_set.labels.cpu()
    right = logits.argmax(1).cpu() == labels
    hits = torch.bincount(labels[right], minlength=test_set.num_classes).tolist()
    counts = test_set.class_counts().tolist()
    return Measurement(
        clean_accuracy=Proportion(sum(hits), len(labels)),
        per_class=tuple(Proportion(hit, count) for hit, count in zip(hits, counts, strict=True)),
        attack_success=None if goal is None else goal.success(network, test_set, batch_size=batch_size),
    )
