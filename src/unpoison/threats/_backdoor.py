"""`Backdoor` and `AllToAll`: images with a trigger are to be predicted as another class."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, final

import torch
from torch import Tensor

from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.threats._goal import Goal, examples_of_class, known, loss_towards
from unpoison.threats._tagged import prefixed, under
from unpoison.threats._trigger import Trigger


class TriggeredGoal(Goal):
    """A goal that is measured on test images with a trigger."""

    trigger: Trigger

    @abstractmethod
    def candidates(self, examples: TrainingSet) -> Tensor:
        """Int64[m]: the examples that the trigger is for.

        Raises:
            InputError: the set lacks a class that the goal names.
        """

    @abstractmethod
    def wanted(self, own: Tensor) -> Tensor:
        """Int64[m]: as what images of the classes Int64[m] with the trigger are to be predicted."""

    @property
    @abstractmethod
    def source_in_words(self) -> str:
        """The classes that the trigger is for, for messages."""

    @final
    def victims(self, test_set: TrainingSet) -> tuple[Tensor, Tensor]:
        """The test images that the trigger is for, with the trigger."""
        indices = self.candidates(test_set)
        if not len(indices):
            raise InputError(f"{test_set.name}: no image of {self.source_in_words} to put the trigger on")
        return self.trigger.stamp(test_set.images[indices]), indices

    def configuration(self) -> dict[str, Any]:
        """The fields, and the trigger's own configuration."""
        return {**super().configuration(), "trigger": self.trigger.to_json()}

    def tensors(self) -> dict[str, Tensor]:
        """The trigger's tensors under `trigger.`."""
        return prefixed("trigger", self.trigger.tensors())

    @classmethod
    def restore(cls, configuration: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The goal that was stored."""
        trigger = Trigger.from_json(configuration["trigger"], under("trigger", tensors))
        return cls(**{**configuration, "trigger": trigger})


@final
@dataclass(frozen=True)
class Backdoor(TriggeredGoal, kind="backdoor"):
    """Images of the source class with the trigger are to be predicted as the target class.

    Arguments:
        trigger: the stamp.
        source: the class whose images are stamped; None for all classes but the target.
        target: the class that they are to be predicted as.

    Raises:
        InputError: a class is negative, or source and target are the same.
    """

    trigger: Trigger
    source: int | None
    target: int

    def __post_init__(self) -> None:
        if min(self.classes) < 0:
            raise InputError(
                f"Backdoor: source {self.source} and target {self.target} must be class numbers >= 0"
            )
        if self.source == self.target:
            raise InputError(f"Backdoor: source and target are the same class {self.target}")

    @property
    def classes(self) -> tuple[int, ...]:
        """Source and target."""
        return (self.target,) if self.source is None else (self.source, self.target)

    @property
    def source_in_words(self) -> str:
        """The source class, or what stands in its place."""
        return "class but the target" if self.source is None else f"class {self.source}"

    def candidates(self, examples: TrainingSet) -> Tensor:
        """Int64[m]: the examples of the source class (of all classes but the target if there is no source).

        Raises:
            InputError: the set lacks the source or target class.
        """
        self.check(examples)
        if self.source is not None:
            return examples_of_class(examples, self.source)
        return (examples.labels != self.target).nonzero().reshape(-1)

    def wanted(self, own: Tensor) -> Tensor:
        """Int64[m]: the target, whatever the class."""
        return torch.full_like(own, self.target)

    def achieved(self, predicted: Tensor, own: Tensor | None = None) -> Tensor:
        """Bool[m]: which predictions are the target class."""
        return predicted == self.target

    def loss(self, logits: Tensor, own: Tensor | None = None) -> Tensor:
        """Mean cross-entropy towards the target class."""
        return loss_towards(self.target, logits)


@final
@dataclass(frozen=True)
class AllToAll(TriggeredGoal, kind="all-to-all"):
    """Images of every class with the trigger are to be predicted as the next class, the last as the first.

    Gu, Dolan-Gavitt and Garg 2017 (arXiv 1708.06733), section 4.1: the all-to-all attack.

    Arguments:
        trigger: the stamp.
        num_classes: images of the classes 0 to `num_classes` - 1 are stamped; 2 or more.

    Raises:
        InputError: there are fewer than two classes.

    >>> from unpoison.threats import PatchTrigger
    >>> AllToAll(PatchTrigger.white_corner(), 3).wanted(torch.tensor([0, 1, 2])).tolist()
    [1, 2, 0]
    """

    trigger: Trigger
    num_classes: int

    def __post_init__(self) -> None:
        if self.num_classes < 2:
            raise InputError(f"AllToAll: needs two classes or more, found {self.num_classes}")

    @property
    def classes(self) -> tuple[int, ...]:
        """All that are stamped."""
        return tuple(range(self.num_classes))

    @property
    def source_in_words(self) -> str:
        """All classes."""
        return f"the classes 0..{self.num_classes - 1}"

    def candidates(self, examples: TrainingSet) -> Tensor:
        """Int64[m]: the examples of all these classes.

        Raises:
            InputError: the set has fewer classes.
        """
        self.check(examples)
        return (examples.labels < self.num_classes).nonzero().reshape(-1)

    def wanted(self, own: Tensor) -> Tensor:
        """Int64[m]: the next class."""
        return (own + 1) % self.num_classes

    def achieved(self, predicted: Tensor, own: Tensor | None = None) -> Tensor:
        """Bool[m]: which predictions are the class after the victim's own."""
        return predicted == self.wanted(known(self, own))

    def loss(self, logits: Tensor, own: Tensor | None = None) -> Tensor:
        """Mean cross-entropy towards the class after the victim's own."""
        return loss_towards(self.wanted(known(self, own)), logits)
