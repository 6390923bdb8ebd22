"""Feature collision (Poison Frogs): each poison looks like its base and has the features of the target.

Shafahi, Huang, Najibi, Suciu, Studer, Dumitras and Goldstein 2018, "Poison Frogs! Targeted Clean-Label
Poisoning Attacks on Neural Networks" (NeurIPS; arXiv 1804.00792), algorithm 1.

Stages: blend a watermark of the target into each base; by forward-backward splitting, alternate a gradient
step towards the target's features and a proximal step towards the base; stay within eps. A victim that
retrains the last layer on the surrogate's features then classifies the target like the poisons.

Presets: "benchmark" has the settings of the poisoning benchmark (watermark 0.3, 120 steps of 0.001, times 0.2
and the step rejected whenever the objective rises, eps 8/255, no pull); "published" those of the paper,
without a bound and with the pull 0.25 (features / pixels) squared. "released" is what the benchmark's public
code does with its settings: it judges a step by the objective before it. The first step cuts the watermark to
eps and so raises the objective; this is noticed one step late, when the step has been taken, and every later
step is compared with the old value and rejected. Most poisons take one step in all, which is a much weaker
attack (see docs/attacks.md).

All poisons are moved in one batch, each with its own step size. Departure: every poison takes all steps, none
stops early. Several target images count by their mean features.

Cost: two forward and one backward pass of all poisons for each step and surrogate; memory for their
activations.

Limits: the victim must use the surrogate's features. Against victims trained from scratch the benchmark found
a success of 0 to 3 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, final

import torch
from torch import Tensor

from unpoison._option_checks import NonNegativeFloat, PositiveFloat, PositiveInt
from unpoison.attacks._attack import Attack, CraftRequest
from unpoison.attacks._feature_space import FeatureProblem, FeatureReader, within
from unpoison.attacks._methods import register
from unpoison.attacks._networks import frozen
from unpoison.registry import Presets
from unpoison.threats import PoisonSet


@final
@register(
    name="feature-collision",
    title="Feature collision (Poison Frogs)",
    summary="Moves each image to where the network has the target image in feature space.",
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
    """The clean-label attack by colliding features, one poison for each base.

    Arguments:
        eps: the largest change of any pixel value in 1/255, in [1, 255].
        steps: of forward-backward splitting, 1 or more.
        step_size: the first and greatest, in units of the whole range for a unit of gradient, above 0.
        shrink: what a poison's step size is multiplied by when its objective rises, in (0, 1).
        watermark: opacity of the target over each base at the start, in [0, 1).
        pull: the weight of the squared distance between poison and base, times (features / pixels) squared;
            0 or more.
        bases: draw poisons from these examples, in this order; empty for the target class.
        layers: modules whose outputs are matched; empty for the input of the last linear layer.
        late: judge each step by the objective before it, as the benchmark's public code does; a poison whose
            objective rises then never moves again.
    """

    PRESETS: ClassVar[Presets] = {
        "benchmark": {},
        "released": {"late": True},
        "published": {"eps": 255.0, "pull": 0.25},
    }

    eps: Annotated[float, "[1, 255]"] = 8.0
    steps: PositiveInt = 120
    step_size: PositiveFloat = 0.001
    shrink: Annotated[float, "(0, 1)"] = 0.2
    watermark: Annotated[float, "[0, 1)"] = 0.3
    pull: NonNegativeFloat = 0.0
    bases: tuple[int, ...] = ()
    layers: tuple[str, ...] = ()
    late: bool = False

    def poison(self, request: CraftRequest) -> PoisonSet:
        """Poisons whose features collide with the target's on every surrogate.

        Raises:
            InputError: there is no surrogate, the budget is more than there are bases, or a layer is not one
                of the surrogate's.
        """
        problem = FeatureProblem.of(request, self.bases, eps=self.eps)
        reader = FeatureReader(request.name, problem.models, self.layers)
        with frozen(problem.models):
            return problem.poison_set(self._collide(problem, reader))

    def _collide(self, problem: FeatureProblem, reader: FeatureReader) -> Tensor:
        """Float[k c h w] in [0, 1]: the poisons, all moved at once."""
        clean, report = problem.clean, problem.request.report
        with torch.no_grad():
            wanted = [each.mean(0) for each in reader(problem.targets)]
        width = sum(len(each) for each in wanted)
        pull = self.pull * (width / clean[0].numel()) ** 2

        def distance(images: Tensor) -> Tensor:
            """Float[k]: the squared distance of each image's features to the target's."""
            found = reader(images)
            return torch.stack(
                [(own - target).square().sum(1) for own, target in zip(found, wanted, strict=True)]
            ).sum(0)

        def penalty(images: Tensor, bases: Tensor) -> Tensor:
            return pull * (images - bases).square().flatten(1).sum(1)

        mean = problem.targets.mean(0, keepdim=True)
        poisons = (1 - self.watermark) * clean + self.watermark * mean
        sizes = clean.new_full((len(clean), 1, 1, 1), self.step_size)
        best = clean.new_full((len(clean),), torch.inf)
        if not self.late:
            poisons = within(poisons, clean, self.eps)
            with torch.no_grad():
                best = distance(poisons) + penalty(poisons, clean)
        moving = torch.arange(len(clean), device=clean.device)
        for step in range(self.steps):
            images = poisons[moving].requires_grad_()
            distances = distance(images)
            (slope,) = torch.autograd.grad(distances.sum(), images)
            with torch.no_grad():
                bases, size = clean[moving], sizes[moving]
                forward = images - size * slope
                tried = within((forward + size * pull * bases) / (1 + size * pull), bases, self.eps)
                value = (distances if self.late else distance(tried)) + penalty(tried, bases)
                better = value <= best[moving]
                rows = better[:, None, None, None]
                poisons[moving] = torch.where(rows, tried, images)
                best[moving] = torch.where(better, value, best[moving])
                sizes[moving] = torch.where(rows, size, size * self.shrink)
            report(step + 1, self.steps, loss=best.mean())
            if self.late:
                # Once its objective has risen, a poison is compared with the same value in every step.
                moving = moving[better]
                if not len(moving):
                    break
        return poisons
