"""`Splits`: a training set and, if there is one, the test set of the same classes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar, cast, final

import torch

from unpoison.data._examples import Examples
from unpoison.data._training_set import TrainingSet
from unpoison.errors import InputError

Read = TypeVar("Read", bound=Examples, covariant=True)
"""A `TrainingSet` where the images are held, `DatasetExamples` where they are read batch by batch."""


@final
@dataclass(frozen=True, eq=False)
class Splits(Generic[Read]):
    """A training set and, when there is one, a test set with the same classes and inputs of the same shape.

    Arguments:
        train: the examples to learn from.
        test: the examples to measure on, or None.
        notes: what was done in reading them, in lines for people: files passed over, images resized.

    Raises:
        InputError: the two differ in class names or in the shape of their inputs.
    """

    train: Read
    test: Read | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.test is None:
            return
        if self.test.class_names != self.train.class_names:
            raise InputError(
                f"{self.test.name}: its classes {_abridged(self.test.class_names)} are not those of "
                f"{self.train.name}, {_abridged(self.train.class_names)}; give both the same classes in the "
                "same order"
            )
        if self.test.input_shape != self.train.input_shape:
            raise InputError(
                f"{self.test.name}: its images have shape {self.test.input_shape}, those of "
                f"{self.train.name} {self.train.input_shape}; give both the same channels, height and width"
            )

    def to(self, device: torch.device | str) -> Splits[Read]:
        """Both sets on another device; what is read batch by batch is moved by who uses it."""

        def moved(one: Any) -> Any:
            return one.to(device) if isinstance(one, TrainingSet) else one

        return Splits(cast("Read", moved(self.train)), moved(self.test), self.notes)


def with_equal_channels(train: TrainingSet, test: TrainingSet) -> tuple[TrainingSet, TrainingSet]:
    """The two sets; if one is coloured, the other becomes so by repeating its channel."""
    channels = max(train.image_shape[0], test.image_shape[0])
    first, second = (
        one
        if one.image_shape[0] == channels
        else replace(one, images=one.images.expand(-1, channels, -1, -1).contiguous())
        for one in (train, test)
    )
    return first, second


def _abridged(names: tuple[str, ...]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return f"[{shown}, ... {len(names)} in all]" if len(names) > 3 else f"[{shown}]"
