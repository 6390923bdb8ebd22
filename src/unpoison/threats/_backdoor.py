"""`Backdoor`: images with a trigger are to be predicted as the target class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.threats._goal import Goal, examples_of_class, loss_towards
from unpoison.threats._tagged import prefixed, under
from unpoison.threats._trigger import Trigger


@final
@dataclass(frozen=True)
class Backdoor(Goal, kind="backdoor"):
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

    def candidates(self, examples: TrainingSet) -> Tensor:
        """Int64[m]: the examples of the source class (of all classes but the target if there is no source).

        Raises:
            InputError: the set lacks the source or target class.
        """
        self.check(examples)
        if self.source is not None:
            return examples_of_class(examples, self.source)
        return (examples.labels != self.target).nonzero().reshape(-1)

    def victims(self, test_set: TrainingSet) -> tuple[Tensor, Tensor]:
        """The stamped test images of the source class, or of all classes but the target."""
        indices = self.candidates(test_set)
        if not len(indices):
            what = "class but the target" if self.source is None else f"class {self.source}"
            raise InputError(f"{test_set.name}: no image of {what} to put the trigger on")
        return self.trigger.stamp(test_set.images[indices]), indices

    def achieved(self, predicted: Tensor) -> Tensor:
        """Bool[m]: which predictions are the target class."""
        return predicted == self.target

    def loss(self, logits: Tensor) -> Tensor:
        """Mean cross-entropy towards the target class."""
        return loss_towards(self.target, logits)

    def configuration(self) -> dict[str, Any]:
        """Source, target and the trigger's own configuration."""
        return {"source": self.source, "target": self.target, "trigger": self.trigger.to_json()}

    def tensors(self) -> dict[str, Tensor]:
        """The trigger's tensors under `trigger.`."""
        return prefixed("trigger", self.trigger.tensors())

    @classmethod
    def restore(cls, configuration: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Backdoor:
        """The backdoor that was stored."""
        trigger = Trigger.from_json(configuration["trigger"], under("trigger", tensors))
        return cls(trigger, configuration["source"], configuration["target"])
