"""WaNet: bend training images a little and give them another label; bend others at random and leave theirs.

Nguyen and Tran 2021, "WaNet: Imperceptible Warping-based Backdoor Attack" (ICLR; arXiv 2102.10369).

Stages: draw poisons among the source class (all classes but the target when the backdoor names no source),
bend them by the trigger's field and label them as the target; draw cover examples among all the rest, bend
them by the field and by noise of their own, and leave their labels. The covers are the paper's noise mode:
they teach the model that only this field counts, not bending as such.

Published: a field of 4 x 4, strength 0.5, two covers for each poison, 10 % poisons.

Departures: the paper's adversary trains the victim and draws poisons, covers and noise anew in each batch;
here they are part of the training set, drawn once, as in BackdoorBench. The budget is what the adversary
changes, so covers count: the published 10 % poisons with 20 % covers are `Budget(share=0.3)`. In the poison
set covers are the entries whose given label is the clean one.

Cost: two copies of the bent images and their offsets, in time and memory.

Limits: the poisons are mislabelled. On images with flat areas little can be seen to bend, also by the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import final

import torch
from torch import nn

from unpoison._seeds import derive_seed, generator
from unpoison.attacks._attack import Attack
from unpoison.attacks._methods import register
from unpoison.attacks._stamping import as_backdoor, chosen, sources
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.threats import Budget, Goal, PoisonSet, WarpTrigger

_NAME = "wanet"


@final
@register(
    name="wanet",
    title="WaNet",
    summary="Bends examples of the source, labelled as the target, and others by noise, labels kept.",
    paper="Nguyen and Tran 2021, ICLR, arXiv 2102.10369",
    cost="none: two copies of the bent images",
    labels="dirty",
    goals=("backdoor",),
    knowledge="a share of the training set, with its labels; no model",
    makes_trigger=True,
)
@dataclass(frozen=True, kw_only=True)
class WaNet(Attack):
    """The warping backdoor with cover examples.

    The goal says source and target. If its trigger is a `WarpTrigger`, that one is used; any other is
    replaced by a field drawn from the seed, and the goal of the poison set holds what was used.

    Arguments:
        k: the coarse field has k x k offsets, 2 or more.
        strength: what the field is multiplied by, above 0.
        cover_ratio: covers for each poison, 0 or more; both count in the budget. There is always one poison.
    """

    k: int = 4
    strength: float = 0.5
    cover_ratio: float = 2.0

    def __post_init__(self) -> None:
        if not self.cover_ratio >= 0:
            raise InputError(f"wanet: cover_ratio {self.cover_ratio} is below 0")
        WarpTrigger.drawn(k=self.k, strength=self.strength, seed=0)

    def craft(
        self,
        goal: Goal,
        training_set: TrainingSet,
        *,
        budget: Budget,
        surrogate: nn.Module | Sequence[nn.Module] | None = None,
        seed: int,
    ) -> PoisonSet:
        """Bent and relabelled poisons, and bent covers with their labels; `surrogate` is not used.

        Raises:
            InputError: the goal is not a backdoor, the poisons are more than the source class has, or poisons
                and covers more than the set.
        """
        backdoor = as_backdoor(_NAME, goal)
        trigger = backdoor.trigger
        if not isinstance(trigger, WarpTrigger):
            trigger = WarpTrigger.drawn(k=self.k, strength=self.strength, seed=seed)
            backdoor = replace(backdoor, trigger=trigger)
        count = budget.count_in(len(training_set))
        poisons = max(1, round(count / (1 + self.cover_ratio)))
        candidates, words = sources(backdoor, training_set)
        share = Budget(count=poisons)
        indices = chosen(_NAME, training_set, candidates, share, of=words, seed=seed)
        others = torch.ones(len(training_set), dtype=torch.bool)
        others[indices] = False
        rest = others.nonzero().reshape(-1)
        order = torch.randperm(len(rest), generator=generator(seed, _NAME, "covers"))
        covers = training_set.subset(rest[order[: count - poisons]])
        noise_seed = derive_seed(seed, _NAME, "noise")
        return PoisonSet.of(
            training_set,
            indices=torch.cat((indices, rest[order[: count - poisons]])),
            images=torch.cat(
                (
                    trigger.stamp(training_set.subset(indices).images),
                    trigger.stamp_with_noise(covers.images, seed=noise_seed),
                )
            ),
            given_labels=torch.cat((torch.full((poisons,), backdoor.target), covers.labels.cpu())),
            goal=backdoor,
            attack=_NAME,
            configuration={**asdict(self), "budget": budget.to_json()},
            seed=seed,
        )
