"""What was searched, how, and how much was flagged: the sentence that every export begins with.

It never says that data is clean: no method finds all poison, and a level holds for what the method tests.
"""

from __future__ import annotations

from typing import Final

from unpoison.detectors import METHODS, Findings
from unpoison.registry import Method
from unpoison.report._svg import plain

LIMITS: Final = (
    "Flagged examples are suspects for a person to look at. Nothing is said about poison that this method "
    "does not find, nor about examples that are not flagged."
)


def statement(findings: Findings) -> str:
    """One sentence of plain text; names from data in it still have to be escaped.

    A traced answer is named by its class.
    """
    level = findings.threshold.false_alarm_level
    at = ", which states no false-alarm level" if level is None else f" at a false-alarm level of {level:g}"
    searched = _searched(findings, f"{len(findings):,} training examples")
    return f"{searched} with {plain(findings.method)}{at}: {len(findings.flagged):,} flagged."


def _searched(findings: Findings, examples: str) -> str:
    observation = findings.observation
    if observation is None or observation.predicted is None:
        return f"Scanned {examples}"
    return f"Traced the answer “{class_of(findings, observation.predicted)}” through {examples}"


def class_of(findings: Findings, label: int) -> str:
    """The name of a class as one line of plain text, or its number where it has none."""
    names = findings.class_names
    return (plain(names[label], limit=100) if 0 <= label < len(names) else "") or f"class {label}"


def declared(findings: Findings) -> Method | None:
    """What is known of the detector, where it is registered."""
    return METHODS.describe(findings.method) if findings.method in METHODS.names() else None
