"""`check_options`: the options of a method against their annotations and against the intervals it allows."""

from __future__ import annotations

import math
import types
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from unpoison.errors import InputError


def check_options(name: str, options: Any, **intervals: str) -> None:
    """Check the fields of a frozen dataclass, and turn lists among them into tuples.

    A field annotated `int` must be a whole number, one annotated `float` a finite number, and one annotated
    `Literal` one of its words; None is allowed where the annotation has it.

    Arguments:
        name: of the method, for messages.
        options: the dataclass instance, in its `__post_init__`.
        **intervals: of numbers by field, such as `eps="[1, 255]"`, `decay="(0, 1]"` or `steps="[1, inf)"`.

    Raises:
        InputError: the first field that does not fit, with what does.

    >>> from dataclasses import make_dataclass
    >>> check_options("sig", make_dataclass("Sig", [("amplitude", float)])(0), amplitude="(0, 255]")
    Traceback (most recent call last):
    unpoison.errors.InputError: sig: amplitude must be a number in (0, 255], found 0
    """
    hints = get_type_hints(type(options))
    for field in fields(options):
        value, hint = getattr(options, field.name), hints[field.name]
        if get_origin(hint) in (Union, types.UnionType):
            if value is None and type(None) in get_args(hint):
                continue
            hint = get_args(hint)[0]
        if get_origin(hint) is Literal and value not in get_args(hint):
            words = ", ".join(map(repr, get_args(hint)))
            raise InputError(f"{name}: {field.name} must be one of {words}, found {value!r}")
        if hint in (int, float) and not _fits(value, hint, intervals.get(field.name)):
            kind = "a whole number" if hint is int else "a number"
            range_ = _in_words(intervals.get(field.name))
            raise InputError(f"{name}: {field.name} must be {kind}{range_}, found {value!r}")
        if isinstance(value, list):
            object.__setattr__(options, field.name, tuple(value))


def _fits(value: Any, hint: type, interval: str | None) -> bool:
    allowed = (int,) if hint is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed) or not math.isfinite(value):
        return False
    if interval is None:
        return True
    low, high = _ends(interval)
    return (value >= low if interval[0] == "[" else value > low) and (
        value <= high if interval[-1] == "]" else value < high
    )


def _in_words(interval: str | None) -> str:
    if interval is None:
        return ""
    low, high = _ends(interval)
    if math.isfinite(high):
        return f" in {interval}"
    return f" of at least {low:g}" if interval[0] == "[" else f" above {low:g}"


def _ends(interval: str) -> tuple[float, float]:
    low, high = interval[1:-1].split(",")
    return float(low), float(high)
