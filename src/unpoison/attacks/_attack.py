"""`Attack`: from a goal, a training set and a budget to a poison set.

Attacks that optimise their poisons against one or several networks take them as `surrogate`; those that only
stamp and relabel ignore it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from unpoison.data import TrainingSet
from unpoison.registry import Method
from unpoison.threats import Budget, Goal, PoisonSet


class Attack(ABC):
    """A way to craft poison; its options are the fields of a frozen dataclass.

    What the conformance tests ask of every attack: it keeps the budget, changes nothing that it does not
    list, gives the labels its declaration promises, gives the same poisons for the same seed, leaves the training
    set and the surrogate as they were, and refuses goals and sets it cannot serve with one clear line.
    """

    method: ClassVar[Method]

    @abstractmethod
    def craft(
        self,
        goal: Goal,
        training_set: TrainingSet,
        *,
        budget: Budget,
        surrogate: nn.Module | Sequence[nn.Module] | None = None,
        seed: int,
    ) -> PoisonSet:
        """The poison set for `goal` within `budget` of `training_set`.

        Arguments:
            goal: what the adversary wants.
            training_set: the clean set.
            budget: how many of its examples may be changed; attacks use all of it.
            surrogate: the network or networks to craft against, float images in [0, 1] in, logits out; never
                changed.
            seed: where all randomness comes from.

        Raises:
            InputError: the attack cannot serve this goal, or the budget does not fit the set.
        """
