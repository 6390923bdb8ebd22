"""The detectors by name, as the command and `unpoison.trace` ask for them."""

from __future__ import annotations

from unpoison.detectors._detector import Detector
from unpoison.detectors.delta_influence import DeltaInfluence
from unpoison.detectors.ekfac_threshold import EKFACThreshold
from unpoison.errors import InputError


def names() -> tuple[str, ...]:
    """The names that `get` takes.

    >>> names()
    ('delta-influence', 'ek-fac')
    """
    return ("delta-influence", "ek-fac")


def get(name: str, *, preset: str | None = None, seed: int = 0) -> Detector:
    """The detector called `name`, with the settings of one of its presets.

    Arguments:
        name: one of `names()`.
        preset: `calibrated` for Delta-Influence and the damped baseline for EK-FAC when None.
        seed: of everything random.

    Raises:
        InputError: there is no such detector or preset.
    """
    if name == "delta-influence":
        return DeltaInfluence.preset(preset or "calibrated", seed=seed)
    if name != "ek-fac":
        raise InputError(f"no detector is called {name!r}; there are {', '.join(names())}")
    if preset == "published":
        return EKFACThreshold.published(seed=seed)
    if preset is not None:
        raise InputError(f"ek-fac: no preset is called {preset!r}; there is 'published', besides its default")
    return EKFACThreshold(seed=seed)
