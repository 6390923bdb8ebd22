"""Adaptive-Blend: a faint picture in pieces on training images, some of which keep their labels.

Qi, Xie, Li, Mahloujifar and Mittal 2023, "Revisiting the Assumption of Latent Separability for Backdoor
Defenses" (ICLR; arXiv 2205.13613).

Stages: draw poisons among the source (all classes but the target if the backdoor has no source) and covers,
the paper's regularisation samples, among all other examples; cut the image into 4 x 4 pieces; in each image
mix a picture faintly into a random half of the pieces; label poisons as the target and keep the labels of
covers. A test image gets the whole picture, more strongly. With covers the trigger does not decide alone, and
every poison has another part of it, so poisons lie among the examples of the target in the victim's features.
No model is needed.

Published (CIFAR-10): 150 poisons and 150 covers among 50,000, which is 0.3 % each; 16 pieces, of which half
are left out; alpha 0.15 in training and 0.2 in testing.

Departures: the picture is noise drawn from the seed where the goal has none (see `Blended`). The budget is
what the adversary changes, so covers count: the published 0.3 % and 0.3 % are `Budget(share=0.006)`.

Cost: one copy of the stamped images, in time and memory.

Limits: the poisons are mislabelled. It is a weak attack by design: with few poisons some victims learn
nothing, so measure several.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, final

import torch
from torch import Tensor

from unpoison._option_checks import NonNegativeFloat, PositiveInt
from unpoison.attacks._attack import Attack, CraftRequest
from unpoison.attacks._covers import draw_with_covers, poison_set_with_covers
from unpoison.attacks._methods import register
from unpoison.threats import BlendTrigger, PoisonSet


@final
@register(
    name="adaptive-blend",
    title="Adaptive-Blend",
    summary="Mixes parts of a picture faintly into poisons and into covers, whose labels stay.",
    paper="Qi, Xie, Li, Mahloujifar and Mittal 2023, ICLR, arXiv 2205.13613",
    cost="none: one copy of the stamped images",
    labels="dirty",
    goals=("backdoor",),
    knowledge="a share of the training set, with its labels; no model",
    makes_trigger=True,
)
@dataclass(frozen=True, kw_only=True)
class AdaptiveBlend(Attack):
    """The blended backdoor whose poisons are not separable.

    If the goal's trigger is a `BlendTrigger`, it is the one of testing. Any other is replaced by noise drawn
    from the seed; the goal of the poison set has the trigger that was used.

    Arguments:
        alpha: the share of the picture in training images, in (0, 1].
        test_alpha: the share of the picture in test images, in (0, 1].
        pieces: the image is cut into so many pieces each way, 1 or more.
        shown: the share of the pieces that each training image gets, in (0, 1].
        cover_ratio: covers for each poison, 0 or more; both count in the budget. There is always one poison.
    """

    alpha: Annotated[float, "(0, 1]"] = 0.15
    test_alpha: Annotated[float, "(0, 1]"] = 0.2
    pieces: PositiveInt = 4
    shown: Annotated[float, "(0, 1]"] = 0.5
    cover_ratio: NonNegativeFloat = 1.0

    def poison(self, request: CraftRequest) -> PoisonSet:
        """Relabelled poisons and covers with their labels, each with its own part of the picture.

        Raises:
            InputError: the poisons or the covers are more than there are, or the picture does not fit the
                images.
        """
        trigger, training_set = request.backdoor.trigger, request.training_set
        if not isinstance(trigger, BlendTrigger):
            shape = training_set.image_shape
            trigger = BlendTrigger.noise(shape, alpha=self.test_alpha, seed=request.seed)
        poisons, covers = draw_with_covers(request, self.cover_ratio)
        images = training_set.subset(torch.cat((poisons, covers))).images
        faint = BlendTrigger(trigger.values, self.alpha).stamp(images)
        parts = self._parts(images, request.generator("pieces")).to(images.device)
        return poison_set_with_covers(
            request,
            poisons,
            covers,
            images=torch.where(parts, faint, images),
            goal=request.with_trigger(trigger),
        )

    def _parts(self, images: Tensor, draws: torch.Generator) -> Tensor:
        """Bool[b 1 h w]: where each image gets the picture."""
        height, width = images.shape[2:]
        grid = min(self.pieces, height, width)
        order = torch.rand(len(images), grid * grid, generator=draws).argsort(1)
        shown = order < max(1, round(self.shown * grid * grid))
        rows, columns = torch.arange(height) * grid // height, torch.arange(width) * grid // width
        return shown.view(-1, 1, grid, grid)[:, :, rows][:, :, :, columns]
