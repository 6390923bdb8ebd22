"""Cutout: black out a square of every image.

DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout" (2017, arXiv
1708.04552), section 3.2; as a defense against poison Borgnia et al. (ICASSP 2021, arXiv 2011.09527). The
centre is uniform over the image, so that part of the square may lie outside; 16 pixels is the paper's for
CIFAR-10.

It is the recipe's `cutout` too; here it stands beside other defenses under its own name.

Cost: none to speak of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from unpoison.data import augment as augmented
from unpoison.defenses._methods import register
from unpoison.errors import InputError
from unpoison.training import Defense


@final
@register(
    name="cutout",
    title="Cutout",
    summary="Blacks out a square of every image.",
    paper="DeVries and Taylor 2017, arXiv 1708.04552",
    cost="none to speak of",
)
@dataclass(frozen=True, kw_only=True)
class Cutout(Defense):
    """A square of every image is black.

    Arguments:
        side: of the square in pixels, 1 or more.

    Raises:
        InputError: `side` is out of its range.
    """

    side: int = 16

    def __post_init__(self) -> None:
        if isinstance(self.side, bool) or not isinstance(self.side, int) or not 1 <= self.side <= 1024:
            raise InputError(f"cutout: side must be a whole number in 1..1024, found {self.side!r}")

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
        """The augmented images, each with its square."""
        return augmented(augment(images), cutout=self.side, generator=generator), labels
