"""What every format needs: images that fit the training set, and a poison set within eps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.threats._goal import Goal
from unpoison.threats._poison_set import PoisonSet


def imported(
    where: str,
    training_set: TrainingSet,
    *,
    indices: Sequence[int],
    images: Tensor,
    labels: Sequence[int],
    goal: Goal,
    attack: str,
    format: str,
    eps: float | None,
) -> PoisonSet:
    """The poison set of a file, if its changes are within eps and the rounding to 8 bits.

    Raises:
        InputError: a change is more than half a step above eps, or something does not fit the training set.
    """
    poison = PoisonSet.of(
        training_set,
        indices=indices,
        images=images,
        given_labels=torch.tensor(labels),
        goal=goal,
        attack=attack,
        configuration={"read from": format, "eps": eps},
        seed=0,
    )
    if eps is not None and len(poison) and float(poison.linf.max()) > eps + 0.5:
        row = int(poison.linf.argmax())
        raise InputError(
            f"{where}: the poison of example {int(poison.indices[row])} changes it by "
            f"{float(poison.linf[row]):g}/255, more than eps {eps:g}; is this the clean set that "
            f"the poison was made from?"
        )
    return poison


def fitting(where: str, pixels: Tensor, training_set: TrainingSet) -> Tensor:
    """The pixels UInt8[c h w] with the channels of the training set.

    Raises:
        InputError: the size is another, or colours would be lost.
    """
    channels, height, width = training_set.image_shape
    if pixels.shape[1:] != (height, width):
        raise InputError(
            f"{where}: is {pixels.shape[1]}x{pixels.shape[2]} pixels, the images of {training_set.name} are "
            f"{height}x{width}"
        )
    if len(pixels) == channels:
        return pixels
    if len(pixels) == 1:
        return pixels.expand(channels, -1, -1).contiguous()
    if channels == 1 and bool((pixels == pixels[:1]).all()):
        return pixels[:1]
    raise InputError(
        f"{where}: has {len(pixels)} channels, the images of {training_set.name} have {channels}"
    )
