"""The options of a method, checked against their annotations and the intervals that these state.

A number states what it allows where it is declared, `eps: Annotated[float, "[1, 255]"]`; the usual intervals
have names.
"""

from __future__ import annotations

import math
import types
from dataclasses import fields
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from unpoison.errors import InputError

PositiveInt = Annotated[int, "[1, inf)"]
NonNegativeInt = Annotated[int, "[0, inf)"]
PositiveFloat = Annotated[float, "(0, inf)"]
NonNegativeFloat = Annotated[float, "[0, inf)"]
Fraction = Annotated[float, "[0, 1]"]


class CheckedOptions:
    """Base of methods: the fields of one that is a dataclass are checked when it is created."""

    def __post_init__(self) -> None:
        declared = getattr(self, "method", None)
        check_options(type(self).__name__ if declared is None else declared.name, self)


def check_options(name: str, options: Any, **intervals: str) -> None:
    """Check the fields of a frozen dataclass against their annotations.

    A field annotated `int` must be a whole number, one annotated `float` a finite number, and one annotated
    `Literal` one of its words; None is allowed where the annotation has it. A field annotated `tuple[T, ...]`
    becomes a tuple, of a list or of one T alone. Numbers of NumPy and torch are stored as Python's, so that
    every option can be written as JSON.

    Arguments:
        name: of the method, for messages.
        options: the dataclass instance, in its `__post_init__`.
        **intervals: of numbers whose annotations state none, by field, such as `eps="[1, 255]"` or
            `steps="[1, inf)"`.

    Raises:
        InputError: the first field that does not fit, with what does.

    >>> from dataclasses import make_dataclass
    >>> check_options("sig", make_dataclass("Sig", [("amplitude", float)])(0), amplitude="(0, 255]")
    Traceback (most recent call last):
    unpoison.errors.InputError: sig: amplitude must be a number in (0, 255], found 0
    """
    hints = get_type_hints(type(options), include_extras=True)
    for field in fields(options):
        value, hint, interval = getattr(options, field.name), hints[field.name], intervals.get(field.name)
        sequence = next((one for one in (hint, *get_args(hint)) if get_origin(one) is tuple), None)
        if sequence is not None and value is not None:
            items = tuple(map(_plain, value)) if isinstance(value, list | tuple) else (_plain(value),)
            fits = all(_fits(item, get_args(sequence)[0], None) for item in items)
            object.__setattr__(options, field.name, items)
        else:
            plain = _plain(value)
            fits = _fits(plain, hint, interval)
            if plain is not value:
                object.__setattr__(options, field.name, plain)
        if not fits:
            raise InputError(f"{name}: {field.name} must be {_in_words(hint, interval)}, found {value!r}")


def _plain(value: Any) -> Any:
    """A scalar of NumPy or torch as Python's, any other value as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _fits(value: Any, hint: Any, interval: str | None) -> bool:
    hint, interval = _interval(hint, interval)
    if _is_union(hint):
        return any(_fits(value, one, interval) for one in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint not in (int, float):
        return isinstance(value, hint) if isinstance(hint, type) else True
    allowed = (int,) if hint is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed) or not math.isfinite(value):
        return False
    if interval is None:
        return True
    low, high = _ends(interval)
    return (value >= low if interval[0] == "[" else value > low) and (
        value <= high if interval[-1] == "]" else value < high
    )


def _in_words(hint: Any, interval: str | None) -> str:
    hint, interval = _interval(hint, interval)
    if get_origin(hint) is tuple:
        return f"a list, each entry {_in_words(get_args(hint)[0], None)}"
    if _is_union(hint):
        return " or ".join(_in_words(one, interval) for one in get_args(hint))
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, get_args(hint)))}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "none"}
    kind = words.get(hint, getattr(hint, "__name__", "another value"))
    if interval is None or hint not in (int, float):
        return kind
    low, high = _ends(interval)
    if math.isfinite(high):
        return f"{kind} in {interval}"
    return f"{kind} of at least {low:g}" if interval[0] == "[" else f"{kind} above {low:g}"


def _interval(hint: Any, interval: str | None) -> tuple[Any, str | None]:
    """The plain type of a hint, and the interval that it states."""
    return get_args(hint) if get_origin(hint) is Annotated else (hint, interval)


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _ends(interval: str) -> tuple[float, float]:
    low, high = interval[1:-1].split(",")
    return float(low), float(high)
