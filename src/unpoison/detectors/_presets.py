"""Presets are known by name, and a name that is not is answered with those that are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from unpoison.errors import InputError

T = TypeVar("T")


def called(name: str, presets: Mapping[str, T], *, of: str) -> T:
    """The preset called `name`, of the detector `of`.

    Raises:
        InputError: there is none of this name; the message lists those there are.

    >>> called("quick", {"quick": 1, "original": 2}, of="Frequency")
    1
    """
    try:
        return presets[name]
    except KeyError:
        verb = "is" if len(presets) == 1 else "are"
        raise InputError(f"{of}: no preset is called {name!r}; there {verb} {', '.join(presets)}") from None
