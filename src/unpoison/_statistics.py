"""Proportions of n trials, with Wilson intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import final

from unpoison.errors import InputError


@final
@dataclass(frozen=True)
class Proportion:
    """`successes` out of `trials`.

    >>> half = Proportion(10, 20)
    >>> half.rate, [round(bound, 3) for bound in half.interval()]
    (0.5, [0.299, 0.701])
    >>> print(Proportion(3, 4))
    75.0 % (3 of 4)
    """

    successes: int
    trials: int

    def __post_init__(self) -> None:
        if not 0 <= self.successes <= self.trials:
            raise InputError(f"Proportion: {self.successes} successes of {self.trials} trials is impossible")

    @property
    def rate(self) -> float:
        """Successes over trials in [0, 1]; NaN for no trials."""
        return self.successes / self.trials if self.trials else math.nan

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The Wilson score interval (Wilson 1927); (0, 1) for no trials."""
        if not self.trials:
            return 0.0, 1.0
        z = NormalDist().inv_cdf(0.5 + level / 2)
        n, rate = self.trials, self.rate
        centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
        # Exactly 0 or 1 at the ends, where rounding could put the rate outside its interval.
        return max(0.0, min(centre - half, rate)), min(1.0, max(centre + half, rate))

    def to_dict(self) -> dict[str, float | int | list[float] | None]:
        """For JSON: rate, successes, trials and the 95 % interval."""
        return {
            "rate": self.rate if self.trials else None,
            "successes": self.successes,
            "trials": self.trials,
            "interval": list(self.interval()),
        }

    def __str__(self) -> str:
        return f"{100 * self.rate:.1f} % ({self.successes} of {self.trials})"
