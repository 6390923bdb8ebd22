"""Bullseye Polytope: poisons whose mean features are those of the target.

Aghakhani, Meng, Wang, Kruegel and Vigna 2021, "Bullseye Polytope: A Scalable Clean-Label Poisoning Attack
with Improved Transferability" (EuroS&P; arXiv 2005.00191), section 4.

Stages: move the poisons, within eps, so that the mean of their features comes to the target's; the loss is
the distance over the length of the target's features, averaged over networks (and over blocks, end-to-end).
With several draws dropout is on and features are averaged over the draws, BP-3x and BP-5x in the paper.
Several target images, the multi-target mode, count by their mean features.

Published: Adam with rate 0.04 on standardised images, 800 steps (linear) or 1,500 (end-to-end), eps 0.1 of
the range (25.5/255); `benchmark()` has the poisoning benchmark's 1,200 steps and eps 8/255.

Cost: a forward and a backward pass of all poisons a step, surrogate and draw; memory for their activations.

Limits: the victim must use features like the surrogates'; against another architecture trained by itself
success was 8.5 % in the benchmark, against 85 % for the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from unpoison._seeds import derive_seed
from unpoison.attacks._attack import Attack
from unpoison.attacks._feature_space import Reader, Scene
from unpoison.attacks._methods import register
from unpoison.attacks._stamping import frozen
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.registry import Presets
from unpoison.threats import Budget, Goal, PoisonSet

_NAME = "bullseye-polytope"


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

    PRESETS: ClassVar[Presets] = {
        "published": {},
        "benchmark": {"eps": 8.0, "steps": 1200},
    }

    eps: float = 25.5
    steps: int = 800
    step_size: float = 0.04
    draws: int = 1
    bases: tuple[int, ...] = ()
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.eps <= 255:
            raise InputError(f"{_NAME}: eps {self.eps} is outside [1, 255]; it is in 1/255")
        if min(self.steps, self.draws) < 1 or not self.step_size > 0:
            raise InputError(
                f"{_NAME}: steps {self.steps}, draws {self.draws} and step_size {self.step_size}: "
                f"must be above 0"
            )
        object.__setattr__(self, "bases", tuple(self.bases))
        object.__setattr__(self, "layers", tuple(self.layers))

    def craft(
        self,
        goal: Goal,
        training_set: TrainingSet,
        *,
        budget: Budget,
        surrogate: nn.Module | Sequence[nn.Module] | None = None,
        seed: int,
    ) -> PoisonSet:
        """Poisons around the target in every surrogate's features, on the first one's device.

        Raises:
            InputError: the goal is not a targeted misclassification, there is no surrogate, the budget is
                more than there are bases, or a layer is not one of the surrogate's.
        """
        scene = Scene.of(
            _NAME, goal, training_set, bases=self.bases, budget=budget, surrogate=surrogate, seed=seed
        )
        dropout = derive_seed(seed, _NAME, "dropout")
        reader = Reader(_NAME, scene.models, self.layers, draws=self.draws, seed=dropout)
        with frozen(scene.models):
            with torch.no_grad():
                wanted = [each.mean(0) for each in reader(scene.targets)]

            def distance(images: Tensor) -> Tensor:
                return torch.stack(
                    [
                        (mine.mean(0) - one).norm() / one.norm().clamp(min=1e-12)
                        for mine, one in zip(reader(images), wanted, strict=True)
                    ]
                ).mean()

            poisons = scene.descended(distance, steps=self.steps, step_size=self.step_size, eps=self.eps)
        return scene.finished(poisons, eps=self.eps, configuration=asdict(self))
