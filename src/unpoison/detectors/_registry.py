"""The detectors by name, as the command and `unpoison.trace` ask for them."""

from __future__ import annotations

from dataclasses import replace

from unpoison.detectors._detector import Detector
from unpoison.detectors.delta_influence import DeltaInfluence, NullDistribution
from unpoison.detectors.ekfac_threshold import EKFACThreshold
from unpoison.errors import InputError


def names() -> tuple[str, ...]:
    """The names that `get` takes.

    >>> names()
    ('delta-influence', 'ek-fac')
    """
    return ("delta-influence", "ek-fac")


def get(
    name: str, *, preset: str | None = None, false_alarm_level: float | None = None, seed: int = 0
) -> Detector:
    """The detector called `name`, with the settings of one of its presets.

    Arguments:
        name: one of `names()`.
        preset: `calibrated` for Delta-Influence and the damped baseline for EK-FAC when None.
        false_alarm_level: another one than the preset's, for a detector that has one.
        seed: of everything random.

    Raises:
        InputError: there is no such detector or preset, or it has no false alarm level.
    """
    if name == "delta-influence":
        detector = DeltaInfluence.preset(preset or "calibrated", seed=seed)
        if false_alarm_level is None:
            return detector
        if isinstance(detector.rule, NullDistribution):
            return replace(detector, rule=replace(detector.rule, false_alarm_level=false_alarm_level))
    elif name != "ek-fac":
        raise InputError(f"no detector is called {name!r}; there are {', '.join(names())}")
    if false_alarm_level is not None:
        raise InputError(f"{name}, {preset or 'default'}: has no false alarm level; 'calibrated' has one")
    if preset == "published":
        return EKFACThreshold.published(seed=seed)
    if preset is not None:
        raise InputError(f"ek-fac: no preset is called {preset!r}; there is 'published', besides its default")
    return EKFACThreshold(seed=seed)
