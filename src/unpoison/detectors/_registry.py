"""Which detectors there are, and what to know about each. This module does not import torch."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, final

from unpoison.errors import InputError

if TYPE_CHECKING:
    from unpoison.detectors._detector import Detector


@final
@dataclass(frozen=True, kw_only=True)
class DetectorCard:
    """What a person should know before choosing a detector."""

    name: str
    """What it is called in commands and artefacts."""
    title: str
    """What the literature calls it."""
    summary: str
    """What it does, in one sentence."""
    needs_observation: bool
    """Whether it starts from a wrong prediction (`trace`) or from the training set alone (`scan`)."""
    presets: tuple[str, ...]
    """Its named settings, the default first."""
    paper: str
    """Authors, year and where to find it."""
    cost: str
    """What finding costs."""
    implementation: str
    """Where the class is: its module, a colon, its name."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON and for tables: everything but where the code is."""
        return {
            "name": self.name,
            "title": self.title,
            "summary": self.summary,
            "needs_observation": self.needs_observation,
            "presets": list(self.presets),
            "paper": self.paper,
            "cost": self.cost,
        }


_CARDS = {
    card.name: card
    for card in (
        DetectorCard(
            name="delta-influence",
            title="Delta-Influence",
            summary="Flags the examples whose influence on the wrong answer collapses as that changes.",
            needs_observation=True,
            presets=("calibrated", "published", "published-smooth", "published-matching"),
            paper="Li et al. 2026, arXiv 2411.13731",
            cost="three passes with per-example gradients, four where poison is found",
            implementation="unpoison.detectors.delta_influence:DeltaInfluence",
        ),
        DetectorCard(
            name="ek-fac",
            title="EK-FAC influence with a threshold",
            summary="Flags the examples whose influence on the wrong answer is above a given number.",
            needs_observation=True,
            presets=("default", "published"),
            paper="Grosse et al. 2023, arXiv 2308.03296; as compared in arXiv 2411.13731",
            cost="three passes with per-example gradients",
            implementation="unpoison.detectors.ekfac_threshold:EKFACThreshold",
        ),
        DetectorCard(
            name="trak",
            title="TRAK with a threshold",
            summary="Flags the examples to which projected gradients attribute the wrong answer.",
            needs_observation=True,
            presets=("original",),
            paper="Park et al. 2023, arXiv 2303.14186",
            cost="one pass with per-example gradients",
            implementation="unpoison.detectors.trak:TRAK",
        ),
        DetectorCard(
            name="activation-clustering",
            title="Activation clustering",
            summary="Parts each class in two by its features, and flags a small group that is apart.",
            needs_observation=False,
            presets=("original", "relative-size", "smaller-cluster", "comparison"),
            paper="Chen et al. 2019, arXiv 1811.03728",
            cost="one forward pass",
            implementation="unpoison.detectors.activation_clustering:ActivationClustering",
        ),
        DetectorCard(
            name="spectral-signatures",
            title="Spectral signatures",
            summary="Flags the examples of each class farthest along the direction in which it varies most.",
            needs_observation=False,
            presets=("original", "comparison"),
            paper="Tran, Li and Madry 2018, arXiv 1811.00636",
            cost="one forward pass",
            implementation="unpoison.detectors.spectral_signatures:SpectralSignatures",
        ),
        DetectorCard(
            name="spectre",
            title="SPECTRE",
            summary="Flags the examples that stand out from a class, its clean covariance divided out.",
            needs_observation=False,
            presets=("original",),
            paper="Hayase et al. 2021, arXiv 2104.11315",
            cost="one forward pass",
            implementation="unpoison.detectors.spectre:Spectre",
        ),
        DetectorCard(
            name="statistical-contamination",
            title="SCAn",
            summary="Flags the second group of a class that is two groups, if there is such a class.",
            needs_observation=False,
            presets=("original",),
            paper="Tang et al. 2021, arXiv 1908.00686",
            cost="two forward passes",
            implementation="unpoison.detectors.statistical_contamination:StatisticalContamination",
        ),
        DetectorCard(
            name="deep-knn",
            title="Deep k-NN",
            summary="Flags the examples whose nearest neighbours are mostly labelled otherwise.",
            needs_observation=False,
            presets=("original",),
            paper="Peri et al. 2020, arXiv 1909.13374",
            cost="one forward pass, and the distances of all pairs",
            implementation="unpoison.detectors.deep_knn:DeepKNN",
        ),
        DetectorCard(
            name="frequency",
            title="Frequency detector",
            summary="Flags the images whose cosine transform looks like that of an image with a trigger.",
            needs_observation=False,
            presets=("quick", "original", "comparison"),
            paper="Zeng et al. 2021, arXiv 2104.03413",
            cost="training a small network, unless a trained one is given",
            implementation="unpoison.detectors.frequency:Frequency",
        ),
    )
}


def names() -> tuple[str, ...]:
    """The names that `get` takes: first those that start from a wrong prediction.

    >>> names()[:3]
    ('delta-influence', 'ek-fac', 'trak')
    """
    return tuple(_CARDS)


def describe(name: str) -> DetectorCard:
    """What to know about the detector called `name`.

    Raises:
        InputError: there is no such detector.

    >>> describe("deep-knn").needs_observation
    False
    """
    try:
        return _CARDS[name]
    except KeyError:
        raise InputError(f"no detector is called {name!r}; there are {', '.join(names())}") from None


def get(
    name: str, *, preset: str | None = None, false_alarm_level: float | None = None, seed: int = 0
) -> Detector:
    """The detector called `name`, with the settings of one of its presets.

    Arguments:
        name: one of `names()`.
        preset: the first of its presets when None.
        false_alarm_level: another one than the preset's, for a detector that has one.
        seed: of everything random, for a detector in which something is.

    Raises:
        InputError: there is no such detector or preset, or it has no false alarm level.
    """
    card = describe(name)
    preset = card.presets[0] if preset is None else preset
    if preset not in card.presets:
        others = [known for known in card.presets if known != "default"]
        listed = ", ".join(others) if "default" not in card.presets else f"{others[0]!r}, besides its default"
        verb = "is" if len(others) == 1 else "are"
        raise InputError(f"{name}: no preset is called {preset!r}; there {verb} {listed}")
    module, _, implementation = card.implementation.partition(":")
    kind = getattr(importlib.import_module(module), implementation)
    if name == "ek-fac":
        detector: Detector = kind() if preset == "default" else kind.published()
    else:
        detector = kind.preset(preset)
    if any(field.name == "seed" for field in fields(kind)):
        detector = replace(detector, seed=seed)  # type: ignore[type-var]
    if false_alarm_level is None:
        return detector
    if name == "delta-influence" and preset == "calibrated":
        rule = replace(detector.rule, false_alarm_level=false_alarm_level)  # type: ignore[attr-defined]
        return replace(detector, rule=rule)  # type: ignore[type-var]
    raise InputError(f"{name}, {preset}: has no false alarm level; 'calibrated' has one")
