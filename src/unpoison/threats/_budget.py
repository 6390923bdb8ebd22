"""`Budget`: how many training examples the adversary may change, always as a share of the whole training set.

Public code counts budgets either within the target class or over the whole set; in unpoison it is always the
latter. This module does not import torch.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any, final

from unpoison.errors import InputError


@final
@dataclass(frozen=True, kw_only=True)
class Budget:
    """A share of the training set in (0, 1], or a count of examples: exactly one of the two.

    Raises:
        InputError: none or both are given, the share is outside (0, 1], or the count is not a whole number >=
            1.

    >>> Budget(share=0.015).count_in(5000)
    75
    >>> Budget(count=75).share_of(5000)
    0.015
    >>> print(Budget(share=0.015))
    1.5 % of the training set
    """

    share: float | None = None
    count: int | None = None

    def __post_init__(self) -> None:
        if (self.share is None) == (self.count is None):
            raise InputError("Budget: give either share=, a part of the training set, or count=, not both")
        if self.share is not None:
            object.__setattr__(self, "share", float(self.share))
        if self.share is not None and not 0 < self.share <= 1:
            raise InputError(
                f"Budget: share {self.share} is outside (0, 1]; 0.01 means 1 % of the training set"
            )
        if self.count is not None:
            try:
                count = None if isinstance(self.count, bool) else operator.index(self.count)
            except TypeError:
                count = None
            if count is None:
                raise InputError(
                    f"Budget: count {self.count!r} is not a whole number; for a part give share="
                )
            object.__setattr__(self, "count", count)
        if self.count is not None and self.count < 1:
            raise InputError(f"Budget: count {self.count} is below 1")

    def count_in(self, n: int) -> int:
        """How many of `n` training examples may be changed.

        A share is rounded to the nearest whole number, halves upwards, and is at least 1.

        Raises:
            InputError: the training set is empty or smaller than the count.
        """
        if n < 1:
            raise InputError("Budget: the training set is empty")
        if self.share is not None:
            # Rounded to nine decimals first, because 0.145 * 100 is 14.499999999999998 in floating point.
            return min(n, max(1, math.floor(round(self.share * n, 9) + 0.5)))
        assert self.count is not None
        if self.count > n:
            raise InputError(f"Budget: count {self.count} is more than the {n} examples of the training set")
        return self.count

    def share_of(self, n: int) -> float:
        """The part of `n` training examples that `count_in` allows, in (0, 1]."""
        return self.count_in(n) / n

    def to_json(self) -> dict[str, Any]:
        """`{"share": ...}` or `{"count": ...}`."""
        return {"share": self.share} if self.share is not None else {"count": self.count}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Budget:
        """The budget that `to_json` wrote.

        Raises:
            InputError: the value holds anything else.
        """
        unknown = sorted(set(value) - {"share", "count"})
        if unknown:
            raise InputError(f"Budget: unknown key {unknown[0]!r}; known are 'share' and 'count'")
        return cls(share=value.get("share"), count=value.get("count"))

    def __str__(self) -> str:
        if self.share is not None:
            return f"{100 * self.share:g} % of the training set"
        return f"{self.count} example{'s' if self.count != 1 else ''}"
