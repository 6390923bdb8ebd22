"""Cutout: black out a square of every image.

DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout" (2017, arXiv
1708.04552), section 3.2; as a defense against poison Borgnia et al. (ICASSP 2021, arXiv 2011.09527). The
centre is uniform over the image, so part of the square may lie outside; 16 pixels is the paper's side for
CIFAR-10. A recipe's `cutout` is the same.

Cost: negligible.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, final

from torch import Tensor

from unpoison.data import augment
from unpoison.defenses._methods import register
from unpoison.training import Batch, Defense


@final
@register(
    name="cutout",
    title="Cutout",
    summary="Blacks out a square of every image.",
    paper="DeVries and Taylor 2017, arXiv 1708.04552",
    cost="negligible",
)
@dataclass(frozen=True, kw_only=True)
class Cutout(Defense):
    """A square of every image is black.

    Arguments:
        side: of the square in pixels, 1 to 1024.

    Raises:
        InputError: `side` is out of its range.
    """

    side: Annotated[int, "[1, 1024]"] = 16

    def batch(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The augmented images, each with its square."""
        return augment(batch.augment(batch.images), cutout=self.side, generator=batch.generator), batch.labels
