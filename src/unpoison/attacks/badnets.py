"""BadNets: stamp a trigger on training images and label them as the target class.

Gu, Dolan-Gavitt and Garg 2017, "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply
Chain" (arXiv 1708.06733), section 4.1.

Stages: draw poisons uniformly among the examples of the source class (of all classes but the target if the
backdoor has no source); stamp them; label them as the target. With the goal `AllToAll` they are drawn among
all examples and labelled as the next class. No model is needed.

Cost: one copy of the stamped images, in time and memory.

Limits: the poisons are mislabelled, which a person who looks at one can see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from unpoison._option_checks import Fraction
from unpoison.attacks._attack import Attack, CraftRequest
from unpoison.attacks._methods import register
from unpoison.errors import InputError
from unpoison.threats import PoisonSet


@final
@register(
    name="badnets",
    title="BadNets",
    summary="Stamps a patch on examples of the source class and labels them as the target class.",
    paper="Gu, Dolan-Gavitt and Garg 2017, arXiv 1708.06733",
    cost="none: one copy of the stamped images",
    labels="dirty",
    goals=("backdoor", "all-to-all"),
    knowledge="a share of the training set, with its labels; no model",
)
@dataclass(frozen=True, kw_only=True)
class BadNets(Attack):
    """The dirty-label backdoor.

    The published experiments that unpoison repeats differ only in goal and budget: a 3x3 white corner, 10 %
    of the set and all classes but the target (BackdoorBench); four black pixels, 1 % of the set and one
    source class (Delta-Influence).

    Arguments:
        least_visible: the least share in [0, 1] of the drawn images that the trigger has to change. A black
            patch changes nothing where images are black, which would leave wrong labels without a backdoor.
            0 allows it.
    """

    least_visible: Fraction = 0.5

    def poison(self, request: CraftRequest) -> PoisonSet:
        """Stamped and relabelled examples.

        Raises:
            InputError: the budget is more than the source class has, or the trigger does not fit the images
                or changes too few of them.
        """
        trigger = request.triggered.trigger
        clean = request.training_set.subset(request.draw_sources()).images
        visible = trigger.changes(clean)
        if visible < self.least_visible:
            value = 255 if float(clean.float().mean()) < 128 else 0
            raise InputError(
                f"badnets: the trigger changes only {100 * visible:.0f} % of the {len(clean)} images "
                f"drawn; choose one that is visible on them, such as PatchTrigger.four_pixels(value={value})"
            )
        return request.relabelled(trigger)
