"""WaNet: warp training images a little and label them as the target; warp others at random, labels kept.

Nguyen and Tran 2021, "WaNet: Imperceptible Warping-based Backdoor Attack" (ICLR; arXiv 2102.10369).

Stages: draw poisons among the source class (all classes but the target if the backdoor has no source), warp
them by the trigger's field and label them as the target; draw cover examples among all other examples, warp
them by the field plus noise of their own, and keep their labels. The covers are the paper's noise mode: with
them the model learns this one field and not warping as such.

Published: a field of 4 x 4, strength 0.5, two covers for each poison, 10 % poisons.

Departures: the paper's adversary trains the victim and draws poisons, covers and noise anew in each batch;
here they are part of the training set, drawn once, as in BackdoorBench. The budget is what the adversary
changes, so covers count: the published 10 % poisons with 20 % covers are `Budget(share=0.3)`. In the poison
set the covers are the entries whose given label is the clean one.

Cost: two copies of the warped images and their offsets, in time and memory.

Limits: the poisons are mislabelled. Where images are flat, warping changes nothing that could be learned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, final

import torch

from unpoison._option_checks import NonNegativeFloat, PositiveFloat
from unpoison.attacks._attack import Attack, CraftRequest
from unpoison.attacks._covers import draw_with_covers, poison_set_with_covers
from unpoison.attacks._methods import register
from unpoison.threats import PoisonSet, WarpTrigger


@final
@register(
    name="wanet",
    title="WaNet",
    summary="Warps examples of the source, labelled as the target, and others by noise, labels kept.",
    paper="Nguyen and Tran 2021, ICLR, arXiv 2102.10369",
    cost="none: two copies of the warped images",
    labels="dirty",
    goals=("backdoor", "all-to-all"),
    knowledge="a share of the training set, with its labels; no model",
    makes_trigger=True,
)
@dataclass(frozen=True, kw_only=True)
class WaNet(Attack):
    """The warping backdoor with cover examples.

    If the goal's trigger is a `WarpTrigger`, it is used. Any other is replaced by a field drawn from the
    seed; the goal of the poison set has the trigger that was used.

    Arguments:
        k: the coarse field has k x k offsets, 2 or more.
        strength: what the field is multiplied by, above 0.
        cover_ratio: covers for each poison, 0 or more; both count in the budget. There is always one poison.
    """

    k: Annotated[int, "[2, inf)"] = 4
    strength: PositiveFloat = 0.5
    cover_ratio: NonNegativeFloat = 2.0

    def poison(self, request: CraftRequest) -> PoisonSet:
        """Warped and relabelled poisons, and warped covers with their labels.

        Raises:
            InputError: the poisons are more than the source class has.
        """
        trigger, training_set = request.triggered.trigger, request.training_set
        if not isinstance(trigger, WarpTrigger):
            trigger = WarpTrigger.drawn(k=self.k, strength=self.strength, seed=request.seed)
        goal = request.with_trigger(trigger)
        poisons, covers = draw_with_covers(request, self.cover_ratio)
        warped = trigger.stamp(training_set.subset(poisons).images)
        noise = request.derived_seed("noise")
        noisy = trigger.stamp_with_noise(training_set.subset(covers).images, seed=noise)
        return poison_set_with_covers(request, poisons, covers, images=torch.cat((warped, noisy)), goal=goal)
