"""The published set-ups of the poisoning benchmark, as goals and bases.

Schwarzschild, Goldblum, Gupta, Dickerson and Goldstein 2021, "Just How Toxic is Data Poisoning?" (ICML; arXiv
2006.12557): 100 draws of a target image, the class it is to be predicted as, and the training images that may
be changed. As JSON, a list of objects with "target class", "target index", "base class", "base indices".

Two of the 100 draws for transfer learning name a base index twice; `Setup` keeps each once.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import final

from unpoison._artefacts import json_in
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.threats._budget import Budget
from unpoison.threats._given_images import TargetedMisclassification


@final
@dataclass(frozen=True, kw_only=True)
class Setup:
    """One trial of the benchmark.

    Arguments:
        target_class: the class of the target image.
        target_index: its place in the test set.
        base_class: the class it is to be predicted as.
        base_indices: places in the training set of the examples that may be changed, each once, in the
            published order.
    """

    target_class: int
    target_index: int
    base_class: int
    base_indices: tuple[int, ...]

    @property
    def budget(self) -> Budget:
        """As many examples as there are bases."""
        return Budget(count=len(self.base_indices))

    def goal(self, test_set: TrainingSet) -> TargetedMisclassification:
        """The goal that the target image of this test set is predicted as the base class.

        Raises:
            InputError: the image at that place is not of the target class, so this is another test set or
                another order.
        """
        if self.target_index >= len(test_set) or int(test_set.labels[self.target_index]) != self.target_class:
            raise InputError(
                f"{test_set.name}: test image {self.target_index} is not of class {self.target_class} as the "
                f"set-up says; give the official test set in its official order"
            )
        return TargetedMisclassification.of(test_set, self.target_index, target=self.base_class)

    def check_bases(self, training_set: TrainingSet) -> None:
        """Check that every base is of the base class in this training set.

        Raises:
            InputError: one is not, so this is another training set or another order.
        """
        bases = training_set.subset(self.base_indices)
        wrong = (bases.labels != self.base_class).nonzero().reshape(-1)
        if len(wrong):
            raise InputError(
                f"{training_set.name}: example {self.base_indices[int(wrong[0])]} is not of class "
                f"{self.base_class} as the set-up says; give the official training set in its official order"
            )


def read_setups(path: str | os.PathLike[str]) -> tuple[Setup, ...]:
    """All set-ups of a file in the benchmark's layout, as JSON.

    Raises:
        InputError: the file cannot be read or is not such a list; the message names the entry.
    """
    listed = json_in(path)
    if not isinstance(listed, list) or not listed:
        raise InputError(f"{path}: expected a list of set-ups, found {type(listed).__name__}")
    setups = []
    for number, one in enumerate(listed):
        try:
            setup = Setup(
                target_class=_whole(one["target class"]),
                target_index=_whole(one["target index"]),
                base_class=_whole(one["base class"]),
                base_indices=tuple(dict.fromkeys(_whole(index) for index in one["base indices"])),
            )
        except (KeyError, TypeError, ValueError) as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(f"{path}: set-up {number}: {reason}") from None
        if not setup.base_indices:
            raise InputError(f"{path}: set-up {number}: has no base indices")
        setups.append(setup)
    return tuple(setups)


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is not a whole number >= 0")
    return value
