"""`Observation`: the wrong prediction that somebody noticed, which is all that tracing starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from unpoison.errors import InputError


@final
@dataclass(frozen=True, eq=False, init=False)
class Observation:
    """One input, or several, that a model answers with the wrong label.

    Arguments:
        images: UInt8[c h w] or UInt8[m c h w]; a float tensor in [0, 1] is rounded to 8 bits; an array or a
            picture with the channels last is turned round.
        predicted: the wrong label that the model gives to each of them.
        true_label: what it ought to have said, where that is known. It is shown to people, never used to
            trace.

    Raises:
        InputError: the image is not one, or the two labels are the same.

    >>> Observation(torch.zeros(1, 8, 8), predicted=5).images.shape
    torch.Size([1, 1, 8, 8])
    """

    images: Tensor
    predicted: int
    true_label: int | None

    def __init__(self, images: Any, predicted: int, true_label: int | None = None) -> None:
        if true_label is not None and int(true_label) == int(predicted):
            raise InputError(f"Observation: label {predicted} is said to be both the wrong and the true one")
        object.__setattr__(self, "images", _as_uint8(images))
        object.__setattr__(self, "predicted", int(predicted))
        object.__setattr__(self, "true_label", None if true_label is None else int(true_label))

    def __len__(self) -> int:
        return len(self.images)


def _as_uint8(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        images = value.detach().cpu()
    else:
        array = np.asarray(value)
        if array.ndim == 2:
            array = array[..., None]
        if array.ndim == 3 and array.shape[-1] in (1, 3) and array.shape[0] not in (1, 3):
            array = array.transpose(2, 0, 1)
        if array.dtype.kind not in "uif":
            raise InputError(f"Observation: expected an image, found {type(value).__name__}")
        images = torch.from_numpy(np.array(array))
    if images.ndim == 2:
        images = images[None]
    if images.ndim == 3:
        images = images[None]
    if images.ndim != 4 or not len(images):
        raise InputError(
            f"Observation: expected an image [c, h, w] or images [m, c, h, w], found {tuple(images.shape)}"
        )
    if images.dtype == torch.uint8:
        return images.contiguous()
    if not images.is_floating_point():
        raise InputError(f"Observation: images must be uint8, or float in [0, 1]; found {images.dtype}")
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise InputError("Observation: float images must lie in [0, 1]; undo the normalisation first")
    return (images * 255).round().to(torch.uint8).contiguous()
