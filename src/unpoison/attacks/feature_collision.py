"""Feature collision (Poison Frogs): each poison looks like its base and has the features of the target.

Shafahi, Huang, Najibi, Suciu, Studer, Dumitras and Goldstein 2018, "Poison Frogs! Targeted Clean-Label
Poisoning Attacks on Neural Networks" (NeurIPS; arXiv 1804.00792), algorithm 1.

Stages: blend a watermark of the target into each base; by forward-backward splitting take a step that brings
the features to the target's and then pull the poison back to its base; stay within eps. A victim that
retrains the last layer on the surrogate's features puts the target on the poisons' side.

Published: `benchmark()` has the settings of the poisoning benchmark (watermark 0.3, 120 steps of 0.001, times
0.2 and the step rejected whenever the objective rises, eps 8/255, no pull); `published()` those of the paper,
without a bound and with the pull 0.25 (features / pixels) squared. `released()` is what the benchmark's
public code does with its settings: it judges a step by the objective before it. The first step cuts the
watermark to eps and so raises the objective; this is seen one step late, when the poison stands there
already, and every later step is measured against the old value and rejected. Most poisons make one step in
all, which is a much weaker attack (docs/attacks.md has both).

All poisons are moved in one batch, each with a step size of its own. Departure: every poison takes all steps,
none stops early. Several target images count by their mean features.

Cost: two forward and one backward pass of all poisons a step and surrogate; memory for their activations.

Limits: the victim must use the surrogate's features; one that trains from scratch hardly minds (0 to 3 % in
the benchmark).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from unpoison.attacks._attack import Attack
from unpoison.attacks._feature_space import Reader, Scene, within
from unpoison.attacks._methods import register
from unpoison.attacks._stamping import frozen
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.registry import Presets
from unpoison.threats import Budget, Goal, PoisonSet

_NAME = "feature-collision"


@final
@register(
    name="feature-collision",
    title="Feature collision (Poison Frogs)",
    summary="Moves each image to where the network sees the target image.",
    paper="Shafahi et al. 2018, NeurIPS, arXiv 1804.00792",
    cost="120 steps of two forward and one backward pass over the poisons",
    presets=("benchmark", "released", "published"),
    labels="clean",
    goals=("targeted-misclassification",),
    knowledge="the network whose features the victim uses",
    surrogates=1,
    accepts_surrogates=True,
)
@dataclass(frozen=True, kw_only=True)
class FeatureCollision(Attack):
    """The clean-label attack by colliding features, one poison a base.

    Arguments:
        eps: the largest change of any pixel value in 1/255, in [1, 255].
        steps: of forward-backward splitting, 1 or more.
        step_size: the first and greatest, in units of the whole range for a unit of gradient, above 0.
        shrink: what a poison's step size is multiplied by when its objective rises, in (0, 1).
        watermark: how much of the target each poison begins with, in [0, 1).
        pull: the weight of the squared distance between poison and base, times (features / pixels) squared;
            0 or more.
        bases: draw poisons from these examples, in this order; empty for the target class.
        layers: modules whose outputs are matched; empty for the input of the last linear layer.
        late: judge each step by the objective before it, as the benchmark's public code does; a poison whose
            objective rises then moves no more.
    """

    PRESETS: ClassVar[Presets] = {
        "benchmark": {},
        "released": {"late": True},
        "published": {"eps": 255.0, "pull": 0.25},
    }

    eps: float = 8.0
    steps: int = 120
    step_size: float = 0.001
    shrink: float = 0.2
    watermark: float = 0.3
    pull: float = 0.0
    bases: tuple[int, ...] = ()
    layers: tuple[str, ...] = ()
    late: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.eps <= 255:
            raise InputError(f"{_NAME}: eps {self.eps} is outside [1, 255]; it is in 1/255")
        if self.steps < 1 or not self.step_size > 0:
            raise InputError(f"{_NAME}: steps {self.steps} and step_size {self.step_size} must be above 0")
        if not 0 < self.shrink < 1 or not 0 <= self.watermark < 1 or not self.pull >= 0:
            raise InputError(
                f"{_NAME}: shrink {self.shrink}, watermark {self.watermark}, pull {self.pull}: out of range"
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
        """Poisons whose features collide with the target's on every surrogate, on the first one's device.

        Raises:
            InputError: the goal is not a targeted misclassification, there is no surrogate, the budget is
                more than there are bases, or a layer is not one of the surrogate's.
        """
        scene = Scene.of(
            _NAME, goal, training_set, bases=self.bases, budget=budget, surrogate=surrogate, seed=seed
        )
        reader = Reader(_NAME, scene.models, self.layers)
        with frozen(scene.models):
            poisons = self._collided(reader, scene.clean, scene.targets)
        return scene.finished(poisons, eps=self.eps, configuration=asdict(self))

    def _collided(self, reader: Reader, clean: Tensor, targets: Tensor) -> Tensor:
        """Float[k c h w] in [0, 1]: the poisons of clean images, all moved at once."""
        with torch.no_grad():
            wanted = [each.mean(0) for each in reader(targets)]
        width = sum(len(each) for each in wanted)
        pull = self.pull * (width / clean[0].numel()) ** 2

        def collision(images: Tensor) -> Tensor:
            """Float[k]: the squared distance of each image's features to the target's."""
            found = reader(images)
            return torch.stack(
                [(mine - one).square().sum(1) for mine, one in zip(found, wanted, strict=True)]
            ).sum(0)

        def drawn(images: Tensor, bases: Tensor) -> Tensor:
            return pull * (images - bases).square().flatten(1).sum(1)

        mean = targets.mean(0, keepdim=True)
        poisons = (1 - self.watermark) * clean + self.watermark * mean
        steps = clean.new_full((len(clean), 1, 1, 1), self.step_size)
        best = clean.new_full((len(clean),), torch.inf)
        if not self.late:
            poisons = within(poisons, clean, self.eps)
            with torch.no_grad():
                best = collision(poisons) + drawn(poisons, clean)
        going = torch.arange(len(clean), device=clean.device)
        for _ in range(self.steps):
            moving = poisons[going].requires_grad_()
            apart = collision(moving)
            (slope,) = torch.autograd.grad(apart.sum(), moving)
            with torch.no_grad():
                bases, step = clean[going], steps[going]
                forward = moving - step * slope
                tried = within((forward + step * pull * bases) / (1 + step * pull), bases, self.eps)
                value = (apart if self.late else collision(tried)) + drawn(tried, bases)
                better = value <= best[going]
                rows = better[:, None, None, None]
                poisons[going] = torch.where(rows, tried, moving)
                best[going] = torch.where(better, value, best[going])
                steps[going] = torch.where(rows, step, step * self.shrink)
            if self.late:
                # One that has risen is measured against the same value for ever, and never moves again.
                going = going[better]
                if not len(going):
                    break
        return poisons
