"""Label flips: wrong labels on unchanged images, of one class or of all.

The two models of label noise of the literature: uniform flips to any other class (Zhang, Bengio, Hardt, Recht
and Vinyals 2017, arXiv 1611.03530) and flips from one class to another (Patrini, Rozza, Menon, Nock and Qu
2017, arXiv 1609.03683; the pair flips of Han et al. 2018, arXiv 1804.06872).

With it detectors can be measured on unintended label errors: the poison set names the wrong labels, and the
goal `LabelNoise` the test images on which they show.

Cost: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast, final

import torch

from unpoison.attacks._attack import Attack, CraftRequest
from unpoison.attacks._methods import register
from unpoison.errors import InputError
from unpoison.threats import LabelNoise, PoisonSet


@final
@register(
    name="label-flip",
    title="Label flips",
    summary="Gives images of one class, or of all, wrong labels, as unintended label noise does.",
    paper="Zhang et al. 2017, arXiv 1611.03530; Patrini et al. 2017, arXiv 1609.03683",
    cost="none",
    labels="dirty",
    goals=("label-noise",),
    knowledge="a share of the training set, with its labels; no model",
)
@dataclass(frozen=True, kw_only=True)
class LabelFlip(Attack):
    """Wrong labels: from the source class to the target, or uniformly to any other class.

    With `LabelNoise(source, target)`, examples of the source class get the target's label. With
    `LabelNoise(source)` each gets a label drawn uniformly from all other classes.

    Arguments:
        everywhere: flip labels of all classes uniformly, as published. The goal then only says on which class
            success is measured, and must have no target.
    """

    everywhere: bool = False

    def poison(self, request: CraftRequest) -> PoisonSet:
        """The same images with other labels.

        Raises:
            InputError: the goal has a target although flips are everywhere, or the budget is more than the
                source class has.
        """
        goal, training_set = cast(LabelNoise, request.goal), request.training_set
        if self.everywhere and goal.target is not None:
            raise InputError(
                f"label-flip: flips everywhere have no target; give LabelNoise({goal.source}) or "
                "everywhere=False"
            )
        if self.everywhere:
            indices = request.draw(torch.arange(len(training_set)), "the training set")
        else:
            indices = request.draw(request.class_examples(goal.source), request.class_in_words(goal.source))
        clean = training_set.subset(indices)
        if goal.target is None:
            # From 1 to classes - 1 further on, modulo the classes: every other class is as likely.
            classes = training_set.num_classes
            steps = torch.randint(1, classes, (len(indices),), generator=request.generator("labels"))
            labels = (clean.labels.cpu() + steps) % classes
        else:
            labels = torch.full((len(indices),), goal.target)
        return request.poison_set(indices=indices, images=clean.images, labels=labels)
