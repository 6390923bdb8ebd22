"""`AdditiveTrigger`: a fixed pattern added to the image and clipped; smooth triggers are of this kind.

Zeng, Park, Mao and Jia 2021, "Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective" (ICCV;
arXiv 2104.03413), section 5: image + trigger, clipped. Their published arrays are float [1 h w c] in [0,
0.2]; `AdditiveTrigger.of` accepts them unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unpoison.errors import InputError
from unpoison.threats._eight_bit import check_overlay
from unpoison.threats._trigger import Trigger


@final
@dataclass(frozen=True, eq=False)
class AdditiveTrigger(Trigger, kind="additive"):
    """Image + pattern, clipped to 8 bits.

    Arguments:
        values: Int16[c h w] in 1/255, -255..255; one channel serves images of any number of channels.
        name: what to call the trigger in messages and reports.

    Raises:
        InputError: the pattern has another type or shape, is out of range or zero everywhere.

    >>> trigger = AdditiveTrigger(torch.full((1, 2, 2), 30, dtype=torch.int16))
    >>> trigger.stamp(torch.full((1, 1, 2, 2), 240, dtype=torch.uint8)).unique().tolist()
    [255]
    """

    values: Tensor = field(repr=False)
    name: str = "additive"

    def __post_init__(self) -> None:
        if self.values.dtype != torch.int16 or self.values.ndim != 3:
            raise InputError(
                f"AdditiveTrigger: values must be int16 of shape [channels, height, width], "
                f"found {self.values.dtype} of shape {tuple(self.values.shape)}"
            )
        if not self.values.any() or int(self.values.abs().max()) > 255:
            raise InputError("AdditiveTrigger: values must lie in -255..255 (1/255) and not all be 0")
        object.__setattr__(self, "values", self.values.detach().cpu().clone())

    @classmethod
    def of(cls, pattern: NDArray[Any] | Tensor, *, name: str = "additive") -> AdditiveTrigger:
        """The trigger from any array: [h w], [c h w], [h w c] or with a leading dimension of 1.

        Integers are in 1/255; floats are in units of the whole range, such as 0..0.2, and are rounded. The
        dimension of size 1 or 3 is taken to be channels; the first one if both could be.

        Raises:
            InputError: the array has another shape, is not finite or out of range.
        """
        array = np.asarray(pattern.detach().cpu() if isinstance(pattern, Tensor) else pattern)
        if array.ndim == 4 and len(array) == 1:
            array = array[0]
        if array.ndim == 2:
            array = array[None]
        if array.ndim != 3 or not {array.shape[0], array.shape[2]} & {1, 3} or array.dtype.kind not in "iuf":
            raise InputError(
                f"AdditiveTrigger.of: expected numbers of shape [h, w], [c, h, w] or [h, w, c] with 1 or 3 "
                f"channels, found {array.dtype} of shape {array.shape}"
            )
        if array.shape[0] not in (1, 3):
            array = array.transpose(2, 0, 1)
        numbers = array.astype(np.float64) * (255 if array.dtype.kind == "f" else 1)
        if not np.isfinite(numbers).all() or np.abs(numbers).max() > 255:
            raise InputError(
                "AdditiveTrigger.of: values must be finite, in -255..255 as integers or -1..1 as floats"
            )
        return cls(torch.from_numpy(np.ascontiguousarray(np.rint(numbers).astype(np.int16))), name)

    def stamp(self, images: Tensor) -> Tensor:
        """The images UInt8[b c h w] with the pattern added."""
        check_overlay(f"additive trigger {self.name}", self.values, images)
        return (images.to(torch.int16) + self.values.to(images.device)).clamp_(0, 255).to(torch.uint8)
