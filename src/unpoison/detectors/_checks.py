"""What is checked before a search starts: the index against the detector, the outputs against the classes."""

from __future__ import annotations

from typing import Any

from torch import nn

from unpoison.data import Examples
from unpoison.detectors._answers import answers_of
from unpoison.detectors._detector import Detector
from unpoison.errors import InputError, MismatchError
from unpoison.influence import InfluenceIndex


def check_index(
    detector: Detector, model: nn.Module, training_set: Examples, index: InfluenceIndex, refine: int
) -> None:
    """That the detector can use the index, and that it is of this model and training set."""
    own: Any = detector
    if not detector.method.uses_index:
        raise InputError(f"{detector.method.name}: reads no index of influences; leave it out")
    if refine < 0:
        raise InputError(f"{detector.method.name}: refine must be at least 0, found {refine}")
    index.check(model, training_set)
    modules = None if own.modules is None else list(own.modules)
    if index.gradient != "measurement" or modules not in (None, index.modules):
        raise MismatchError(
            f"{index.directory}: an index of the gradients of the {index.gradient} in the modules "
            f"{index.modules or 'tracked by default'}; {detector.method.name} asks for those of the "
            f"measurement in {modules or 'these'}"
        )


def check_outputs(model: nn.Module, training_set: Examples) -> None:
    """That the model has an output for each class."""
    try:
        logits = answers_of(model, training_set.batch(0, 1)[0])
    except InputError:
        return  # features may be read where logits cannot
    if logits.shape[1] < training_set.num_classes:
        raise InputError(
            f"{training_set.name}: its labels are 0..{training_set.num_classes - 1}, but the model gives "
            f"{logits.shape[1]} logits; are classes numbered from 0?"
        )
