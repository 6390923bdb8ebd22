"""Blended: mix a picture faintly into training images and label them as the target class.

Chen, Liu, Li, Lu and Song 2017, "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning"
(arXiv 1712.05526), the blended injection strategy.

Stages: mix the picture into examples of the source class (of all classes but the target if the backdoor has
no source); label them as the target. No model is needed.

Published: alpha 0.2 with a cartoon or with uniform noise as the picture; BackdoorBench poisons 10 % of the
set, all classes but the target. No cartoon comes with unpoison: the default is noise, and
`BlendTrigger(picture, alpha)` takes any other picture.

Cost: one copy of the stamped images, in time and memory.

Limits: the poisons are mislabelled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, final

from unpoison.attacks._attack import Attack, CraftRequest
from unpoison.attacks._methods import register
from unpoison.threats import BlendTrigger, PoisonSet


@final
@register(
    name="blended",
    title="Blended",
    summary="Mixes a picture faintly into examples of the source class, labelled as the target.",
    paper="Chen, Liu, Li, Lu and Song 2017, arXiv 1712.05526",
    cost="none: one copy of the stamped images",
    labels="dirty",
    goals=("backdoor", "all-to-all"),
    knowledge="a share of the training set, with its labels; no model",
    makes_trigger=True,
)
@dataclass(frozen=True, kw_only=True)
class Blended(Attack):
    """The blended backdoor.

    If the goal's trigger is a `BlendTrigger`, it is used. Any other is replaced by noise drawn from the seed;
    the goal of the poison set has the trigger that was used.

    Arguments:
        alpha: the share of the noise, in (0, 1].
    """

    alpha: Annotated[float, "(0, 1]"] = 0.2

    def poison(self, request: CraftRequest) -> PoisonSet:
        """Mixed and relabelled examples.

        Raises:
            InputError: the budget is more than the source class has, or the picture does not fit the images.
        """
        trigger = request.triggered.trigger
        if not isinstance(trigger, BlendTrigger):
            shape = request.training_set.image_shape
            trigger = BlendTrigger.noise(shape, alpha=self.alpha, seed=request.seed)
        return request.relabelled(trigger)
