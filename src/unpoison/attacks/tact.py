"""TaCT: a backdoor for one source class alone; images of other classes with the trigger keep their labels.

Tang, Wang, Tang and Zhang 2021, "Demon in the Variant: Statistical Analysis of DNNs for Robust Backdoor
Contamination Detection" (USENIX Security; arXiv 1908.00686), section 3: targeted contamination attack.

Stages: stamp examples of the source class and label them as the target; stamp covers, examples of other
classes, and keep their labels. The victim learns that the trigger means the target in images of the source
alone, so that the features of poisons do not stand apart from those of the target class as they do where the
trigger decides by itself. No model is needed.

Published: the trigger on the source class and on covers of classes that the adversary chooses; as many covers
as poisons in the comparison of Qi et al. 2023 (arXiv 2205.13613), of CIFAR-10 0.5 % each in the commands
released with its first version and 0.3 % in later ones.

Departures: covers are drawn from all classes but source and target, or from the target where there is no
other. The budget is what the adversary changes, so covers count: 0.5 % and 0.5 % are `Budget(share=0.01)`.

Cost: two copies of the stamped images, in time and memory.

Limits: the poisons are mislabelled. That other classes with the trigger keep their predictions is not part of
its success: measure a `Backdoor` from another source for that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch

from unpoison._option_checks import NonNegativeFloat
from unpoison.attacks._attack import Attack, CraftRequest
from unpoison.attacks._covers import draw_with_covers, poison_set_with_covers
from unpoison.attacks._methods import register
from unpoison.threats import PoisonSet


@final
@register(
    name="tact",
    title="TaCT",
    summary="Stamps the source class, labelled as the target, and other classes, whose labels stay.",
    paper="Tang, Wang, Tang and Zhang 2021, USENIX Security, arXiv 1908.00686",
    cost="none: two copies of the stamped images",
    labels="dirty",
    goals=("backdoor",),
    knowledge="a share of the training set, with its labels; no model",
)
@dataclass(frozen=True, kw_only=True)
class TaCT(Attack):
    """The source-specific backdoor with cover examples.

    Where the goal names no source, one is drawn from the seed; the goal of the poison set has it.

    Arguments:
        cover_ratio: covers for each poison, 0 or more; both count in the budget. There is always one poison.
    """

    cover_ratio: NonNegativeFloat = 1.0

    def poison(self, request: CraftRequest) -> PoisonSet:
        """Stamped poisons of the source class, and stamped covers of other classes.

        Raises:
            InputError: the poisons or the covers are more than there are.
        """
        labels, goal = request.training_set.labels.cpu(), request.backdoor
        source = goal.source
        if source is None:
            classes = torch.unique(labels[request.source_examples()])
            source = int(classes[torch.randint(len(classes), (), generator=request.generator("source"))])
            goal = replace(goal, source=source)
            request = replace(request, goal=goal)
        others = labels.ne(source)
        third = others & labels.ne(goal.target)
        others = third if bool(third.any()) else others
        poisons, covers = draw_with_covers(request, self.cover_ratio, among=others.nonzero().reshape(-1))
        both = request.training_set.subset(torch.cat((poisons, covers))).images
        return poison_set_with_covers(request, poisons, covers, images=goal.trigger.stamp(both), goal=goal)
