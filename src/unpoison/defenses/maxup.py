"""MaxUp: augment every image several times, and learn from the worst copy.

Gong, Ren, Ye and Liu, "MaxUp: Lightweight Adversarial Training with Data Augmentation Improves Neural Network
Training" (CVPR 2021, arXiv 2002.09024), algorithm 1; as a defense against poison Borgnia et al. (ICASSP 2021,
arXiv 2011.09527).

The loss of an image is the largest of its copies; only that copy has a gradient. The copies are augmented as
the recipe says, and cut out if `cutout` is not 0: a recipe without augmentation needs that, or all copies are
the same.

Cost: as many forward and backward passes as there are copies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from unpoison.data import TrainingSet
from unpoison.data import augment as augmented
from unpoison.defenses._methods import register
from unpoison.errors import InputError
from unpoison.training import Defense, Recipe


@final
@register(
    name="maxup",
    title="MaxUp",
    summary="Augments every image several times and learns from the worst copy.",
    paper="Gong et al., CVPR 2021, arXiv 2002.09024",
    cost="as many trainings as there are copies, 4 by default",
)
@dataclass(frozen=True, kw_only=True)
class MaxUp(Defense):
    """The worst of several copies counts.

    Arguments:
        copies: 2 or more.
        cutout: side in pixels of a black square in every copy; 0 is none.

    Raises:
        InputError: a value is out of its range, or, when training begins, all copies would be the same.
    """

    copies: int = 4
    cutout: int = 0

    def __post_init__(self) -> None:
        for name, least, most in (("copies", 2, 64), ("cutout", 0, 1024)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise InputError(f"maxup: {name} must be a whole number in {least}..{most}, found {value!r}")

    def begin(self, training_set: TrainingSet, recipe: Recipe, *, seed: int) -> TrainingSet:
        """Look whether copies will differ."""
        if not (recipe.flip or recipe.crop_padding or recipe.cutout or self.cutout):
            raise InputError("maxup: the recipe augments nothing, so all copies are the same; give a cutout")
        return training_set

    def batch(
        self,
        images: Tensor,
        labels: Tensor,
        indices: Tensor,
        *,
        epoch: int,
        augment: Callable[[Tensor], Tensor],
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """All copies, one after the other, and their labels."""
        shown = augment(images.repeat(self.copies, 1, 1, 1))
        if self.cutout:
            shown = augmented(shown, cutout=self.cutout, generator=generator)
        return shown, labels.repeat(self.copies)

    def gradients(
        self,
        model: nn.Module,
        images: Tensor,
        targets: Tensor,
        *,
        logits_of: Callable[[Tensor], Tensor],
        loss_of: Callable[..., Tensor],
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """The gradient of the mean, over images, of the largest loss of a copy."""
        logits = logits_of(images)
        losses = loss_of(logits, targets, reduction="none").reshape(self.copies, -1)
        loss = losses.amax(0).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss, logits
