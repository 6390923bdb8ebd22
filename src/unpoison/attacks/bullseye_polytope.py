"""Bullseye Polytope: poisons whose mean features are those of the target.

Aghakhani, Meng, Wang, Kruegel and Vigna 2021, "Bullseye Polytope: A Scalable Clean-Label Poisoning Attack
with Improved Transferability" (EuroS&P; arXiv 2005.00191), section 4.

Stages: move the poisons, within eps, so that the mean of their features approaches the target's. The loss is
the distance divided by the length of the target's features, averaged over networks (and over blocks in the
end-to-end variant). With several draws dropout is on and features are averaged over the draws (BP-3x and
BP-5x in the paper). With several target images, the multi-target mode, their mean features are matched.

Published: Adam with rate 0.04 on standardised images, 800 steps, eps 0.1 of the range (25.5/255); the
end-to-end variant takes 1,500 steps and the output of every block: `get("bullseye-polytope", steps=1500,
layers=("network.block1", ...))`. The preset "benchmark" has the poisoning benchmark's 1,200 steps and eps
8/255.

Cost: a forward and a backward pass of all poisons for each step, surrogate and draw; memory for their
activations.

Limits: the victim must use features like the surrogates'. In the benchmark success was 85 % against the
surrogate's own network and 8.5 % against another one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, final

import torch
from torch import Tensor

from unpoison._option_checks import PositiveFloat, PositiveInt
from unpoison.attacks._attack import Attack, CraftRequest
from unpoison.attacks._feature_space import FeatureProblem, FeatureReader
from unpoison.attacks._methods import register
from unpoison.attacks._networks import frozen
from unpoison.registry import Presets
from unpoison.threats import PoisonSet


@final
@register(
    name="bullseye-polytope",
    title="Bullseye Polytope",
    summary="Moves images so that the mean of their features is that of the target image.",
    paper="Aghakhani et al. 2021, EuroS&P, arXiv 2005.00191",
    cost="800 forward and backward passes over the poisons",
    presets=("published", "benchmark"),
    labels="clean",
    goals=("targeted-misclassification",),
    knowledge="the network whose features the victim uses, or several like it",
    surrogates=1,
    accepts_surrogates=True,
)
@dataclass(frozen=True, kw_only=True)
class BullseyePolytope(Attack):
    """The clean-label attack by the mean of the poisons' features.

    Arguments:
        eps: the largest change of any pixel value in 1/255, in [1, 255].
        steps: of Adam, 1 or more.
        step_size: of Adam, in standard deviations of each channel's pixels, above 0.
        draws: of dropout, 1 or more; with 1 dropout is off.
        bases: draw poisons from these examples, in this order; empty for the target class.
        layers: modules whose outputs are matched, each apart; empty for the input of the last linear layer.
    """

    PRESETS: ClassVar[Presets] = {"published": {}, "benchmark": {"eps": 8.0, "steps": 1200}}

    eps: Annotated[float, "[1, 255]"] = 25.5
    steps: PositiveInt = 800
    step_size: PositiveFloat = 0.04
    draws: PositiveInt = 1
    bases: tuple[int, ...] = ()
    layers: tuple[str, ...] = ()

    def poison(self, request: CraftRequest) -> PoisonSet:
        """Poisons around the target in every surrogate's features.

        Raises:
            InputError: there is no surrogate, the budget is more than there are bases, or a layer is not one
                of the surrogate's.
        """
        problem = FeatureProblem.of(request, self.bases, eps=self.eps)
        reader = FeatureReader(
            request.name,
            problem.models,
            self.layers,
            draws=self.draws,
            seed=request.derived_seed("dropout"),
        )
        with frozen(problem.models):
            with torch.no_grad():
                wanted = [each.mean(0) for each in reader(problem.targets)]

            def distance(images: Tensor) -> Tensor:
                return torch.stack(
                    [
                        (own.mean(0) - target).norm() / target.norm().clamp(min=1e-12)
                        for own, target in zip(reader(images), wanted, strict=True)
                    ]
                ).mean()

            poisons = problem.descend(distance, steps=self.steps, step_size=self.step_size)
        return problem.poison_set(poisons)
