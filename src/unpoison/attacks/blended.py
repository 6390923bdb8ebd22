"""Blended: mix a picture faintly into training images and give them another label.

Chen, Liu, Li, Lu and Song 2017, "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning"
(arXiv 1712.05526), the blended injection strategy.

Stages: mix the picture into examples of the source class (of all classes but the target when the backdoor
names no source); label them as the target. No model is needed.

Published: alpha 0.2 with a cartoon or with uniform noise as the picture; BackdoorBench poisons 10 % of the
set, all classes but the target. No cartoon comes with unpoison: the default is noise, and
`BlendTrigger(picture, alpha)` takes any other.

Cost: one copy of the stamped images, in time and memory.

Limits: the poisons are mislabelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import final

from torch import nn

from unpoison.attacks._attack import Attack
from unpoison.attacks._methods import register
from unpoison.attacks._stamping import as_backdoor, relabelled
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.threats import BlendTrigger, Budget, Goal, PoisonSet

_NAME = "blended"


@final
@register(
    name="blended",
    title="Blended",
    summary="Mixes a picture faintly into examples of the source class, labelled as the target.",
    paper="Chen, Liu, Li, Lu and Song 2017, arXiv 1712.05526",
    cost="none: one copy of the stamped images",
    labels="dirty",
    goals=("backdoor",),
    knowledge="a share of the training set, with its labels; no model",
    makes_trigger=True,
)
@dataclass(frozen=True, kw_only=True)
class Blended(Attack):
    """The blended backdoor.

    The goal says source and target. If its trigger is a `BlendTrigger`, that one is used; any other is
    replaced by noise drawn from the seed, and the goal of the poison set holds what was used.

    Arguments:
        alpha: how much of the noise, in (0, 1].
    """

    alpha: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise InputError(f"blended: alpha {self.alpha} is outside (0, 1]")

    def craft(
        self,
        goal: Goal,
        training_set: TrainingSet,
        *,
        budget: Budget,
        surrogate: nn.Module | Sequence[nn.Module] | None = None,
        seed: int,
    ) -> PoisonSet:
        """Mixed and relabelled examples; `surrogate` is not used.

        Raises:
            InputError: the goal is not a backdoor, the budget is more than the source class has, or the
                picture does not fit the images.
        """
        backdoor = as_backdoor(_NAME, goal)
        if not isinstance(backdoor.trigger, BlendTrigger):
            trigger = BlendTrigger.noise(training_set.image_shape, alpha=self.alpha, seed=seed)
            backdoor = replace(backdoor, trigger=trigger)
        return relabelled(_NAME, backdoor, training_set, budget=budget, configuration=asdict(self), seed=seed)
