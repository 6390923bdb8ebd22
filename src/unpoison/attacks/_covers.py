"""Covers: examples that an attack changes like its poisons, or nearly so, and whose labels it keeps.

They teach a victim what the trigger is not: warping as such (WaNet), the pattern of another image
(input-aware), images of other classes (TaCT), or that the trigger always decides (the adaptive attacks).
In a poison set they are the entries whose given label is the clean one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unpoison.attacks._attack import CraftRequest
from unpoison.errors import InputError
from unpoison.threats import PoisonSet, TriggeredGoal


def draw_with_covers(
    request: CraftRequest, ratio: float, *, among: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Int64[p] poisons, of what the trigger is for, and Int64[q] covers; p + q is the budget.

    Arguments:
        request: of a goal with a trigger.
        ratio: covers for each poison, 0 or more; there is always one poison.
        among: Int64[m], on the CPU: what covers are drawn from; all examples when None. What is drawn as a
            poison is no cover.

    Raises:
        InputError: there are too few examples of either.
    """
    poisons = request.draw_sources(count=max(1, round(request.count / (1 + ratio))))
    count = len(request.training_set)
    free = torch.ones(count, dtype=torch.bool)
    free[poisons] = False
    pool = free.nonzero().reshape(-1) if among is None else among[free[among]]
    wanted = request.count - len(poisons)
    if wanted > len(pool):
        raise InputError(
            f"{request.name}: a budget of {request.budget} has {wanted} covers, and {len(pool)} examples are "
            f"left for them; at most {len(poisons) + len(pool)} of {count} fit"
        )
    order = torch.randperm(len(pool), generator=request.generator("covers"))
    return poisons, pool[order[:wanted]]


def poison_set_with_covers(
    request: CraftRequest, poisons: Tensor, covers: Tensor, *, images: Tensor, goal: TriggeredGoal
) -> PoisonSet:
    """The poison set of poisons, labelled as the goal wants, and of covers, which keep their labels.

    Arguments:
        request: what is crafted.
        poisons: Int64[p].
        covers: Int64[q].
        images: UInt8[p+q c h w], the changed images in this order.
        goal: with the trigger that was used.
    """
    labels = request.training_set.labels.cpu()
    return request.poison_set(
        indices=torch.cat((poisons, covers)),
        images=images,
        labels=torch.cat((goal.wanted(labels[poisons]), labels[covers])),
        goal=goal,
    )
