"""Float pixels in [0, 1] as the 8-bit levels that they came from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from unpoison.errors import InputError

_ROWS_AT_ONCE = 1024


class OffGridError(InputError):
    """What was read are no 8-bit images."""


def eight_bit(
    where: Callable[[int], str],
    images: np.ndarray[Any, Any],
    *,
    tolerance: float,
    if_outside: str,
    if_between: str,
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """UInt8[n ...] from floats in [0, 1] that are 8-bit levels divided by 255.

    Arguments:
        where: what to call an image in messages, by its row.
        images: Float[n ...].
        tolerance: from `grid_tolerance`.
        if_outside: what to do about values outside [0, 1], for the message.
        if_between: what to do about values between two levels, for the message.

    Raises:
        InputError: a value is not finite, outside [0, 1], or between two levels; names the first such image.
    """
    pixels = np.empty(images.shape, np.uint8)
    for start in range(0, len(images), _ROWS_AT_ONCE):
        levels = images[start : start + _ROWS_AT_ONCE].astype(np.float64) * 255
        with np.errstate(invalid="ignore"):
            whole = np.rint(levels)
            faults = (
                (~np.isfinite(levels), InputError, "a pixel is NaN or infinite; repair or remove the image"),
                (
                    (whole < 0) | (whole > 255),
                    OffGridError,
                    f"a float pixel lies outside [0, 1]; {if_outside}",
                ),
                (
                    np.abs(levels - whole) > tolerance,
                    OffGridError,
                    f"float pixels must be multiples of 1/255; {if_between}",
                ),
            )
        for wrong, kind, problem in faults:
            if wrong.any():
                raise kind(f"{where(start + int(np.argwhere(wrong)[0, 0]))}: {problem}")
        pixels[start : start + _ROWS_AT_ONCE] = whole
    return pixels


def grid_tolerance(dtype: np.dtype[Any]) -> float:
    """The largest rounding error of a pixel of this type, in levels of 1/255.

    float16 resolves 1/2048 in the upper half of the range, an eighth of a level, and normalisation may double
    the error. That of float32 is far below a hundredth.
    """
    return 0.3 if dtype == np.float16 else 0.02
