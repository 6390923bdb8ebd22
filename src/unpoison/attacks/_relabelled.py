"""What dirty-label backdoors with a trigger of their own have in common."""

from __future__ import annotations

from dataclasses import replace

import torch

from unpoison.attacks._attack import CraftRequest
from unpoison.threats import PoisonSet, Trigger


def relabelled(request: CraftRequest, trigger: Trigger) -> PoisonSet:
    """Examples of the source class with the trigger, labelled as the target.

    Arguments:
        request: for a backdoor.
        trigger: used in place of the goal's if it is another; the poison set's goal has it.
    """
    goal = request.backdoor
    if trigger is not goal.trigger:
        goal = replace(goal, trigger=trigger)
    indices = request.draw_sources()
    return request.poison_set(
        indices=indices,
        images=trigger.stamp(request.training_set.subset(indices).images),
        labels=torch.full((len(indices),), goal.target),
        goal=goal,
    )
