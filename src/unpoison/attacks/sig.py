"""SIG: stripes on some images of the target class, labels untouched.

Barni, Kallas and Tondi 2019, "A New Backdoor Attack in CNNs by Training Set Corruption without Label
Poisoning" (ICIP; arXiv 1902.11237).

Stages: draw examples of the target class; add a sine along the columns; leave the labels. What the model
learns is that stripes speak for the target class. No model is needed.

Published: amplitude 40 and 6 periods in BackdoorBench (the paper trains with 20 to 40 and tests with up to
60). Papers count the share within the target class; here it is of the whole set, as everywhere in unpoison:
10 % of one of ten equal classes is `Budget(share=0.01)`, and the paper's strongest, 40 %, is
`Budget(share=0.04)`.

Cost: one copy of the stamped images, in time and memory.

Limits: the stripes are visible, and few poisons give a weak backdoor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import final

from torch import nn

from unpoison.attacks._attack import Attack
from unpoison.attacks._methods import register
from unpoison.attacks._stamping import as_backdoor, chosen, targets
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.threats import Budget, Goal, PoisonSet, SinusoidTrigger

_NAME = "sig"


@final
@register(
    name="sig",
    title="SIG",
    summary="Adds a sine along the columns to some images of the target class; labels stay.",
    paper="Barni, Kallas and Tondi 2019, ICIP, arXiv 1902.11237",
    cost="none: one copy of the stamped images",
    labels="clean",
    goals=("backdoor",),
    knowledge="a share of the target class; no model",
    makes_trigger=True,
)
@dataclass(frozen=True, kw_only=True)
class Sig(Attack):
    """The clean-label sinusoid backdoor.

    The goal says source and target. If its trigger is a `SinusoidTrigger`, that one is used; any other is
    replaced by the one described here, and the goal of the poison set holds what was used.

    Arguments:
        amplitude: of the sine in 1/255, in (0, 255].
        frequency: periods over the width, above 0.
    """

    amplitude: float = 40.0
    frequency: float = 6.0

    def __post_init__(self) -> None:
        SinusoidTrigger(self.amplitude, self.frequency)

    def craft(
        self,
        goal: Goal,
        training_set: TrainingSet,
        *,
        budget: Budget,
        surrogate: nn.Module | Sequence[nn.Module] | None = None,
        seed: int,
    ) -> PoisonSet:
        """Striped examples of the target class; `surrogate` is not used.

        Raises:
            InputError: the goal is not a backdoor, the budget is more than the target class has, or the
                frequency gives no stripes in images of this width.
        """
        backdoor = as_backdoor(_NAME, goal)
        trigger = backdoor.trigger
        if not isinstance(trigger, SinusoidTrigger):
            trigger = SinusoidTrigger(self.amplitude, self.frequency)
            backdoor = replace(backdoor, trigger=trigger)
        candidates, words = targets(backdoor, training_set)
        indices = chosen(_NAME, training_set, candidates, budget, of=words, seed=seed)
        clean = training_set.subset(indices)
        if trigger.changes(clean.images) < 1:
            width = training_set.image_shape[2]
            raise InputError(
                f"sig: {trigger.frequency:g} periods change nothing in images {width} pixels wide; "
                f"choose a frequency that is no multiple of {width / 2:g}"
            )
        return PoisonSet.of(
            training_set,
            indices=indices,
            images=trigger.stamp(clean.images),
            given_labels=clean.labels,
            goal=backdoor,
            attack=_NAME,
            configuration={**asdict(self), "budget": budget.to_json()},
            seed=seed,
        )
