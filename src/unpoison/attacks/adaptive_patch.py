"""Adaptive-Patch: one of several faint patches on each training image, some of which keep their labels.

Qi, Xie, Li, Mahloujifar and Mittal 2023, "Revisiting the Assumption of Latent Separability for Backdoor
Defenses" (ICLR; arXiv 2205.13613).

Stages: draw poisons among the source (all classes but the target if the backdoor has no source) and covers,
the paper's regularisation samples, among all other examples; put one of four patches on each, half
transparent; label poisons as the target and keep the labels of covers. Test images get two of the patches at
once, opaque. No model is needed.

Published (CIFAR-10): 150 poisons and 300 covers among 50,000, which is 0.3 % and 0.6 %; four triggers with
opacities 0.5, 0.2, 0.5 and 0.3; several stronger ones at once in testing.

Departures: the paper's patches are pictures, which do not come with unpoison; here they are blocks of random
colours, drawn from the seed, one in each corner, a quarter of the side of the image each. The two of testing
are those with the greatest opacity in training. The budget is what the adversary changes, so covers count:
the published 0.3 % and 0.6 % are `Budget(share=0.009)`.

Cost: one copy of the stamped images, in time and memory.

Limits: the poisons are mislabelled, and the patches of testing are plainly visible.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, final

import torch
from torch import Tensor

from unpoison._option_checks import NonNegativeFloat
from unpoison.attacks._attack import Attack, CraftRequest
from unpoison.attacks._covers import draw_with_covers, poison_set_with_covers
from unpoison.attacks._methods import register
from unpoison.errors import InputError
from unpoison.threats import PatchTrigger, PoisonSet, RandomPatchTrigger

_CORNERS = 4


@final
@register(
    name="adaptive-patch",
    title="Adaptive-Patch",
    summary="Puts one of four faint patches on poisons and on covers, whose labels stay; two in testing.",
    paper="Qi, Xie, Li, Mahloujifar and Mittal 2023, ICLR, arXiv 2205.13613",
    cost="none: one copy of the stamped images",
    labels="dirty",
    goals=("backdoor",),
    knowledge="a share of the training set, with its labels; no model",
    makes_trigger=True,
)
@dataclass(frozen=True, kw_only=True)
class AdaptivePatch(Attack):
    """The patch backdoor whose poisons are not separable.

    The goal's trigger is replaced by the patches of testing; the goal of the poison set has them.

    Arguments:
        opacities: of each patch in training images, in (0, 1]; one to four, in the order of the corners from
            left to right and top to bottom.
        test_opacity: of the patches in test images, in (0, 1].
        test_patches: how many of them test images get, in 1..4: those with the greatest opacities.
        size: the side of a patch as a share of the shorter side of the image, in (0, 0.5].
        cover_ratio: covers for each poison, 0 or more; both count in the budget. There is always one poison.
    """

    opacities: tuple[float, ...] = (0.5, 0.2, 0.5, 0.3)
    test_opacity: Annotated[float, "(0, 1]"] = 1.0
    test_patches: Annotated[int, "[1, 4]"] = 2
    size: Annotated[float, "(0, 0.5]"] = 0.25
    cover_ratio: NonNegativeFloat = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        count = len(self.opacities)
        if not 1 <= count <= _CORNERS or not all(0 < one <= 1 for one in self.opacities):
            raise InputError(
                f"adaptive-patch: opacities must be one to four numbers in (0, 1], found {self.opacities}"
            )
        if self.test_patches > count:
            raise InputError(f"adaptive-patch: test_patches {self.test_patches} of {count} patches")

    def poison(self, request: CraftRequest) -> PoisonSet:
        """Relabelled poisons and covers with their labels, each with one of the patches.

        Raises:
            InputError: the poisons or the covers are more than there are.
        """
        values, corners = self._patches(request)
        strongest = sorted(range(len(corners)), key=lambda corner: -self.opacities[corner])
        shown = torch.zeros_like(corners[0])
        for corner in strongest[: self.test_patches]:
            shown |= corners[corner]
        trigger = self._trigger(values, shown, self.test_opacity)
        poisons, covers = draw_with_covers(request, self.cover_ratio)
        images = request.training_set.subset(torch.cat((poisons, covers))).images
        drawn = torch.randint(len(corners), (len(images),), generator=request.generator("patches"))
        stamped = images.clone()
        for corner, place in enumerate(corners):
            rows = (drawn == corner).nonzero().reshape(-1).to(images.device)
            stamped[rows] = self._trigger(values, place, self.opacities[corner]).stamp(images[rows])
        goal = request.with_trigger(trigger)
        return poison_set_with_covers(request, poisons, covers, images=stamped, goal=goal)

    def _patches(self, request: CraftRequest) -> tuple[Tensor, list[Tensor]]:
        """UInt8[c h w] with all patches, and the Bool[h w] of each."""
        channels, height, width = request.training_set.image_shape
        side = max(1, round(self.size * min(height, width)))
        values = torch.zeros(channels, height, width, dtype=torch.uint8)
        corners = []
        for corner in range(len(self.opacities)):
            rows = slice(0, side) if corner < 2 else slice(height - side, height)
            columns = slice(0, side) if corner % 2 == 0 else slice(width - side, width)
            seed = request.derived_seed("patch", corner)
            values[:, rows, columns] = RandomPatchTrigger.coloured(side, channels=channels, seed=seed).values
            place = torch.zeros(height, width, dtype=torch.bool)
            place[rows, columns] = True
            corners.append(place)
        return values, corners

    def _trigger(self, values: Tensor, place: Tensor, opacity: float) -> PatchTrigger:
        share = max(1, round(255 * opacity))
        return PatchTrigger(values, place.to(torch.uint8) * share, 0, 0, "adaptive patches")
