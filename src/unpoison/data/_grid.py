"""Float pixels and the 8-bit levels they came from."""

from __future__ import annotations

from typing import Any

import numpy as np


def grid_tolerance(dtype: np.dtype[Any]) -> float:
    """How far from a whole level, in levels of 1/255, rounding of this type may put a pixel.

    Half precision resolves 1/2048 of the upper half of the range, an eighth of a level, and normalising
    before that costs as much again. What float32 loses is far below a hundredth.
    """
    return 0.3 if dtype == np.float16 else 0.02
