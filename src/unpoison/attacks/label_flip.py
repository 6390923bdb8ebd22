"""Label flips: wrong labels on honest images, of one class or everywhere.

The two models of label noise of the literature: uniform flips to any other class (Zhang, Bengio, Hardt, Recht
and Vinyals 2017, arXiv 1611.03530) and flips from one class to another that looks like it (Patrini, Rozza,
Menon, Nock and Qu 2017, arXiv 1609.03683; the pair flips of Han et al. 2018, arXiv 1804.06872).

They are here so that a tracer can be asked about mistakes that nobody meant: a poison set says which labels
are wrong, and the goal `Mistakes` on which test images it shows.

Cost: none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import final

import torch
from torch import nn

from unpoison._seeds import generator
from unpoison.attacks._attack import Attack
from unpoison.attacks._methods import register
from unpoison.attacks._stamping import chosen
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.threats import Budget, Goal, Mistakes, PoisonSet

_NAME = "label-flip"


@final
@register(
    name="label-flip",
    title="Label flips",
    summary="Gives images of one class, or of all, wrong labels: mistakes that nobody meant.",
    paper="Zhang et al. 2017, arXiv 1611.03530; Patrini et al. 2017, arXiv 1609.03683",
    cost="none",
    labels="dirty",
    goals=("mistakes",),
    knowledge="a share of the training set, with its labels; no model",
)
@dataclass(frozen=True, kw_only=True)
class LabelFlip(Attack):
    """Wrong labels: from the source class to the target, or uniformly to any other class.

    With `Mistakes(source, target)`, examples of the source class get the target's label. With
    `Mistakes(source)` each gets a label drawn uniformly from all other classes.

    Arguments:
        everywhere: flip labels of all classes, uniformly; the goal then only says on which class success is
            measured, and must have no target. The published uniform noise.
    """

    everywhere: bool = False

    def craft(
        self,
        goal: Goal,
        training_set: TrainingSet,
        *,
        budget: Budget,
        surrogate: nn.Module | Sequence[nn.Module] | None = None,
        seed: int,
    ) -> PoisonSet:
        """The same images with other labels; `surrogate` is not used.

        Raises:
            InputError: the goal is not `Mistakes`, names a target although flips are everywhere, or the
                budget is more than the source class has.
        """
        if not isinstance(goal, Mistakes):
            raise InputError(f"{_NAME}: serves the goal 'mistakes' only, not {goal.kind!r}")
        if self.everywhere and goal.target is not None:
            raise InputError(
                f"{_NAME}: flips everywhere have no target; give Mistakes({goal.source}) or everywhere=False"
            )
        candidates = goal.candidates(training_set)
        words = f"class {goal.source} ({training_set.class_names[goal.source]})"
        if self.everywhere:
            candidates, words = torch.arange(len(training_set)), "the training set"
        indices = chosen(_NAME, training_set, candidates, budget, of=words, seed=seed)
        clean = training_set.subset(indices)
        if goal.target is None:
            # Between 1 and classes - 1 further on, round the circle: every other class is as likely.
            steps = torch.randint(
                1, training_set.num_classes, (len(indices),), generator=generator(seed, _NAME, "labels")
            )
            labels = (clean.labels.cpu() + steps) % training_set.num_classes
        else:
            labels = torch.full((len(indices),), goal.target)
        return PoisonSet.of(
            training_set,
            indices=indices,
            images=clean.images,
            given_labels=labels,
            goal=goal,
            attack=_NAME,
            configuration={**asdict(self), "budget": budget.to_json()},
            seed=seed,
        )
