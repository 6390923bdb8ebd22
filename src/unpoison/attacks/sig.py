"""SIG: stripes on some images of the target class, which keep their labels.

Barni, Kallas and Tondi 2019, "A New Backdoor Attack in CNNs by Training Set Corruption without Label
Poisoning" (ICIP; arXiv 1902.11237).

Stages: draw examples of the target class; add a sine along the columns; keep the labels. The model learns
that stripes indicate the target class. No model is needed.

Published: amplitude 40 and 6 periods in BackdoorBench (the paper trains with 20 to 40 and tests with up to
60). Papers count the share within the target class; here it is of the whole set, as everywhere in unpoison:
10 % of one of ten equal classes is `Budget(share=0.01)`, and the paper's largest, 40 %, is
`Budget(share=0.04)`.

Cost: one copy of the stamped images, in time and memory.

Limits: the stripes are visible, and few poisons give a weak backdoor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, final

from unpoison._option_checks import PositiveFloat
from unpoison.attacks._attack import Attack, CraftRequest
from unpoison.attacks._methods import register
from unpoison.errors import InputError
from unpoison.threats import PoisonSet, SinusoidTrigger


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

    If the goal's trigger is a `SinusoidTrigger`, it is used. Any other is replaced by the one described here;
    the goal of the poison set has the trigger that was used.

    Arguments:
        amplitude: of the sine in 1/255, in (0, 255].
        frequency: periods over the width, above 0.
    """

    amplitude: Annotated[float, "(0, 255]"] = 40.0
    frequency: PositiveFloat = 6.0

    def poison(self, request: CraftRequest) -> PoisonSet:
        """Striped examples of the target class.

        Raises:
            InputError: the budget is more than the target class has, or the frequency gives no stripes in
                images of this width.
        """
        trigger = request.backdoor.trigger
        if not isinstance(trigger, SinusoidTrigger):
            trigger = SinusoidTrigger(self.amplitude, self.frequency)
        indices = request.draw_targets()
        clean = request.training_set.subset(indices)
        if trigger.changes(clean.images) < 1:
            width = request.training_set.image_shape[2]
            raise InputError(
                f"sig: {trigger.frequency:g} periods change nothing in images {width} pixels wide; "
                f"choose a frequency that is no multiple of {width / 2:g}"
            )
        goal, images = request.with_trigger(trigger), trigger.stamp(clean.images)
        return request.poison_set(indices=indices, images=images, labels=clean.labels, goal=goal)
