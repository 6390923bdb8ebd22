"""Convex polytope: poisons whose features enclose those of the target.

Zhu, Huang, Shafahi, Li, Taylor, Studer and Goldstein 2019, "Transferable Clean-Label Poisoning Attacks on
Deep Neural Nets" (ICML; arXiv 1905.05897), section 3.

Stages: for each network find the weights, non-negative and of sum one, with which the weighted poisons'
features come nearest to the target's; move the poisons, within eps, so that they come nearer; repeat.

Published: Adam with rate 0.04 on standardised images, 4,000 steps, eps 0.1 of the range (25.5/255), poisons
start at their bases; in the end-to-end variant the same at every block (`layers`). The preset "benchmark" has
the poisoning benchmark's 1,200 steps and eps 8/255.

Departures: the weights are found by accelerated projected gradients on the Gram matrices of all networks at
once, with a fixed number of steps from the last weights, without leaving the device; the public code calls a
solver on the CPU for each network, with up to 10,000 steps. Several target images count by their mean
features.

Cost: a forward and a backward pass of all poisons for each step and surrogate; the weights cost `inner`
products of a k x k matrix for k poisons. Memory for the activations of all poisons.

Limits: weights become sparse, so some poisons hardly change, or not at all: judge a detector by how much each
poison changed, not by membership alone. The victim must use features like the surrogates'.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    name="convex-polytope",
    title="Convex polytope",
    summary="Moves images so that their features enclose those of the target image.",
    paper="Zhu et al. 2019, ICML, arXiv 1905.05897",
    cost="4,000 forward and backward passes over the poisons",
    presets=("published", "benchmark"),
    labels="clean",
    goals=("targeted-misclassification",),
    knowledge="the network whose features the victim uses, or several like it",
    surrogates=1,
    accepts_surrogates=True,
)
@dataclass(frozen=True, kw_only=True)
class ConvexPolytope(Attack):
    """The clean-label attack by a polytope of poisons around the target.

    Arguments:
        eps: the largest change of any pixel value in 1/255, in [1, 255].
        steps: of Adam, 1 or more.
        step_size: of Adam, in standard deviations of each channel's pixels, above 0.
        inner: steps for the weights between two steps of Adam, 1 or more.
        bases: draw poisons from these examples, in this order; empty for the target class.
        layers: modules whose outputs are matched, each apart; empty for the input of the last linear layer.
    """

    PRESETS: ClassVar[Presets] = {"published": {}, "benchmark": {"eps": 8.0, "steps": 1200}}

    eps: Annotated[float, "[1, 255]"] = 25.5
    steps: PositiveInt = 4000
    step_size: PositiveFloat = 0.04
    inner: PositiveInt = 50
    bases: tuple[int, ...] = ()
    layers: tuple[str, ...] = ()

    def poison(self, request: CraftRequest) -> PoisonSet:
        """Poisons that enclose the target in every surrogate's features.

        Raises:
            InputError: there is no surrogate, the budget is more than there are bases, or a layer is not one
                of the surrogate's.
        """
        problem = FeatureProblem.of(request, self.bases, eps=self.eps)
        reader = FeatureReader(request.name, problem.models, self.layers)
        with frozen(problem.models):
            with torch.no_grad():
                wanted = [each.mean(0) for each in reader(problem.targets)]
            count = len(problem.clean)
            weights = problem.clean.new_full((len(wanted), count), 1 / count)

            def distance(images: Tensor) -> Tensor:
                nonlocal weights
                found = reader(images)
                weights = nearest_weights(grams_around(found, wanted), weights, steps=self.inner)
                return torch.stack(
                    [
                        0.5 * (row @ own - target).square().sum() / target.square().sum().clamp(min=1e-12)
                        for row, own, target in zip(weights, found, wanted, strict=True)
                    ]
                ).sum()

            poisons = problem.descend(distance, steps=self.steps, step_size=self.step_size)
        return problem.poison_set(poisons)


def grams_around(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Float[m k k]: for each network the inner products of the poisons' features, centred on the target's."""
    differences = [own.detach() - target for own, target in zip(found, wanted, strict=True)]
    return torch.stack([each @ each.T for each in differences])


def nearest_weights(grams: Tensor, start: Tensor, *, steps: int) -> Tensor:
    """Float[m k]: weights c on the simplex that make `c G c` small for each of m problems.

    Since the weights sum to one, `c G c` is the squared distance of the weighted features to the target,
    where G holds the inner products of the features minus the target's. Accelerated projected gradients (Beck
    and Teboulle 2009), all problems at once; nothing leaves the device.

    Arguments:
        grams: Float[m k k], the matrices G.
        start: Float[m k], the first weights.
        steps: how many.
    """
    # The projection removes the common part of all entries, so only the centred matrix limits the rate. The
    # fourth root of the norm of its fourth power is a close upper bound of its largest eigenvalue.
    centred = grams - grams.mean(1, keepdim=True)
    centred = centred - centred.mean(2, keepdim=True)
    size = torch.linalg.matrix_norm(centred, keepdim=True).clamp(min=1e-12)
    square = (centred / size) @ (centred / size)
    bound = size * torch.linalg.matrix_norm(square @ square, keepdim=True).clamp(min=1e-12) ** 0.25
    # Where all poisons are alike the bound is nearly 0; a longer step would lose digits.
    least = 1e-4 * torch.linalg.matrix_norm(grams, keepdim=True) + 1e-12
    rate = 1 / torch.maximum(bound, least)[:, :, 0]
    weights = leading = start
    for step in range(steps):
        slope = (grams @ leading[:, :, None])[:, :, 0]
        moved = on_simplex(leading - rate * slope)
        leading = moved + step / (step + 3) * (moved - weights)
        weights = moved
    return weights


def on_simplex(points: Tensor) -> Tensor:
    """Float[m k]: the nearest points with entries of 0 or more and of sum one (Duchi et al. 2008)."""
    ordered = points.sort(1, descending=True).values
    counts = torch.arange(1, points.shape[1] + 1, device=points.device)
    excess = (ordered.cumsum(1) - 1) / counts
    # Entries above the common excess are a prefix, so counting them finds the last.
    last = (ordered > excess).sum(1, keepdim=True) - 1
    return (points - excess.gather(1, last)).clamp(min=0)
