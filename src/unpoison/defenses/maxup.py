"""MaxUp: augment every image several times, and learn from the copy with the largest loss.

Gong, Ren, Ye and Liu, "MaxUp: Lightweight Adversarial Training with Data Augmentation Improves Neural Network
Training" (CVPR 2021, arXiv 2002.09024), algorithm 1; as a defense against poison Borgnia et al. (ICASSP 2021,
arXiv 2011.09527).

The loss of an image is the largest of its copies; only that copy has a gradient. Copies are augmented as the
recipe says, and cut out if `cutout` is not 0; a recipe without augmentation needs that.

Cost: as many forward and backward passes as there are copies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, final

from torch import Tensor

from unpoison.data import TrainingSet, augment
from unpoison.defenses._methods import register
from unpoison.errors import InputError
from unpoison.training import Batch, Defense, Recipe, Step


@final
@register(
    name="maxup",
    title="MaxUp",
    summary="Augments every image several times and learns from the copy with the largest loss.",
    paper="Gong et al., CVPR 2021, arXiv 2002.09024",
    cost="as many trainings as there are copies, 4 by default",
)
@dataclass(frozen=True, kw_only=True)
class MaxUp(Defense):
    """Learn from the copy with the largest loss.

    Arguments:
        copies: 2 to 64.
        cutout: side in pixels of a black square in every copy; 0 is none.

    Raises:
        InputError: a value is out of its range, or, when training begins, all copies would be equal.
    """

    copies: Annotated[int, "[2, 64]"] = 4
    cutout: Annotated[int, "[0, 1024]"] = 0

    def begin(self, training_set: TrainingSet, recipe: Recipe, *, seed: int) -> TrainingSet:
        """Check that copies will differ."""
        if not (recipe.flip or recipe.crop_padding or recipe.cutout or self.cutout):
            raise InputError(
                "maxup: the recipe has no augmentation, so all copies would be equal; set cutout"
            )
        return training_set

    def batch(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """All copies, and their labels."""
        images = batch.augment(batch.images.repeat(self.copies, 1, 1, 1))
        images = augment(images, cutout=self.cutout, generator=batch.generator)
        return images, batch.labels.repeat(self.copies)

    def gradients(self, step: Step) -> tuple[Tensor, Tensor]:
        """The gradient of the mean over images of the largest loss of their copies."""
        logits = step.logits_of(step.images)
        losses = step.loss_of(logits, step.targets, reduction="none").reshape(self.copies, -1)
        loss = losses.amax(0).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss, logits
