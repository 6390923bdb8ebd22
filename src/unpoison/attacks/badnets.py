"""BadNets: stamp a trigger on training images and give them another label.

Gu, Dolan-Gavitt and Garg 2017, "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply
Chain" (arXiv 1708.06733), section 4.1.

Stages: pick poisons uniformly among the examples of the source class (of all classes but the target when the
backdoor names no source); stamp them; label them as the target. No model is needed.

Cost: one copy of the stamped images, in time and memory.

Limits: the poisons are mislabelled, so a person who looks at one sees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import final

import torch
from torch import nn

from unpoison._seeds import generator
from unpoison.attacks._attack import Attack
from unpoison.attacks._methods import register
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.threats import Backdoor, Budget, Goal, PoisonSet


@final
@register(
    name="badnets",
    title="BadNets",
    summary="Stamps a patch on examples of the source class and labels them as the target class.",
    paper="Gu, Dolan-Gavitt and Garg 2017, arXiv 1708.06733",
    cost="none: one copy of the stamped images",
    labels="dirty",
    goals=("backdoor",),
    knowledge="a share of the training set, with its labels; no model",
)
@dataclass(frozen=True, kw_only=True)
class BadNets(Attack):
    """The dirty-label backdoor.

    The published experiments that `unpoison` repeats differ only in what they are given: a 3x3 white corner,
    10 % of the set and all classes but the target (BackdoorBench); four black pixels, 1 % of the set and one
    source class (Delta-Influence).

    Arguments:
        least_visible: the least share in [0, 1] of the images to be stamped that the trigger must change at
            all. A black patch on images with a black corner changes nothing, and what is left are wrong
            labels without a backdoor; 0 allows it.
    """

    least_visible: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.least_visible <= 1:
            raise InputError(f"badnets: least_visible {self.least_visible} is outside [0, 1]")

    def craft(
        self,
        goal: Goal,
        training_set: TrainingSet,
        *,
        budget: Budget,
        surrogate: nn.Module | Sequence[nn.Module] | None = None,
        seed: int,
    ) -> PoisonSet:
        """Stamped and relabelled examples; `surrogate` is not used.

        Raises:
            InputError: the goal is not a backdoor, the budget is more than the source class has, the trigger
                does not fit the images or changes too few of those picked.
        """
        if not isinstance(goal, Backdoor):
            raise InputError(f"badnets: serves the goal 'backdoor' only, not {goal.kind!r}")
        candidates = goal.candidates(training_set).cpu()
        count = budget.count_in(len(training_set))
        source = _describe_source(goal, training_set)
        if count > len(candidates):
            fits = (
                f"at most {len(candidates)} fit, a share of {len(candidates) / len(training_set):.4g}"
                if len(candidates)
                else "none fits"
            )
            raise InputError(
                f"badnets: a budget of {budget} ({count} of {len(training_set)}) is more than the "
                f"{len(candidates)} examples of {source}; {fits}"
            )
        order = torch.randperm(len(candidates), generator=generator(seed, "badnets", "poisons"))
        indices = candidates[order[:count]].sort().values
        clean = training_set.subset(indices).images
        visible = goal.trigger.changes(clean)
        if visible < self.least_visible:
            value = 255 if float(clean.float().mean()) < 128 else 0
            raise InputError(
                f"badnets: the trigger changes only {100 * visible:.0f} % of the {count} images picked from "
                f"{source}; choose one that stands out, such as PatchTrigger.four_pixels(value={value})"
            )
        return PoisonSet.of(
            training_set,
            indices=indices,
            images=goal.trigger.stamp(clean),
            given_labels=torch.full((count,), goal.target),
            goal=goal,
            attack="badnets",
            configuration={**asdict(self), "budget": budget.to_json()},
            seed=seed,
        )


def _describe_source(goal: Backdoor, training_set: TrainingSet) -> str:
    if goal.source is None:
        return f"all classes but {goal.target} ({training_set.class_names[goal.target]})"
    return f"class {goal.source} ({training_set.class_names[goal.source]})"
