"""Plain values, as TOML or JSON gives them, into the frozen dataclasses of a schema, by cattrs.

Values are taken as they are written: "3" is no number, true is no whole number, and one value stands for a
list of one. The first thing that does not fit is an `InputError` in one line that names its place and, for an
unknown key, the nearest known one. cattrs is imported when something is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from unpoison.errors import InputError, UnpoisonError, nearest

T = TypeVar("T")
_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def structured(cls: type[T], values: Any, place: str) -> T:
    """The dataclass `cls` made of a mapping, whose `place` is what messages call it.

    Its fields may be dataclasses, tuples of them, mappings, text and numbers.

    Raises:
        InputError: an unknown key, a missing one, a value of the wrong type, or one that a class refuses.
    """
    from cattrs.errors import BaseValidationError

    try:
        found: T = _converter().structure(values, cls)
    except (BaseValidationError, UnpoisonError) as error:
        raise InputError(_told(error, place)) from None
    return found


@cache
def _converter() -> Any:
    from cattrs import Converter

    converter: Any = Converter(forbid_extra_keys=True)
    for kind in _WORDS:
        converter.register_structure_hook(kind, _plain)
    converter.register_structure_hook_func(_is_plain_union, _plain)
    converter.register_structure_hook_func(lambda kind: _origin(kind) is Mapping, _table)
    converter.register_structure_hook_factory(lambda kind: _origin(kind) is tuple, _tuple_hook)
    base = converter.gen_structure_attrs_fromdict

    def section(kind: Any) -> Any:
        read = base(kind)
        return lambda values, _: read(_table(values, kind), kind)

    converter.register_structure_hook_factory(dataclasses.is_dataclass, section)
    return converter


def _origin(kind: Any) -> Any:
    return get_origin(kind)


def _is_plain_union(kind: Any) -> bool:
    return _origin(kind) in (Union, UnionType) and {*get_args(kind)} <= {*_WORDS, NoneType}


def _plain(value: Any, kind: Any) -> Any:
    """Text, a number, true or false; where the kind is a union, one of its members."""
    kinds = get_args(kind) or (kind,)
    if value is None and NoneType in kinds:  # not in TOML, but in stored JSON
        return None
    for one in kinds:
        allowed = (int, float) if one is float else one
        if isinstance(value, allowed) and isinstance(value, bool) == (one is bool):
            return one(value)
    wanted = " or ".join(_WORDS[one] for one in kinds if one in _WORDS)
    raise InputError(f"must be {wanted}, found {value!r}")


def _table(value: Any, kind: Any) -> Any:
    if not isinstance(value, Mapping):
        raise InputError(f"must be a table, found {value!r}")
    return dict(value)


def _tuple_hook(kind: Any, converter: Any) -> Any:
    members = get_args(kind)
    repeated = members[-1] is Ellipsis

    def entry(number: int, value: Any) -> Any:
        try:
            return converter.structure(value, members[0 if repeated else number])
        except Exception as error:
            error.add_note(f"[{number}]")
            raise

    def read(value: Any, _: Any) -> tuple[Any, ...]:
        listed = isinstance(value, list | tuple)
        if repeated and not listed:
            return (converter.structure(value, members[0]),)
        if not listed or not (repeated or len(value) == len(members)):
            raise InputError(f"must be a list of {len(members)}, found {value!r}")
        return tuple(entry(number, one) for number, one in enumerate(value))

    return read


def _told(error: Exception, place: str) -> str:
    """The first thing that went wrong, after the places that lead to it."""
    from cattrs.errors import AttributeValidationNote, ClassValidationError, ForbiddenExtraKeysError

    notes = getattr(error, "__notes__", [])
    name = next((f": {note.name}" for note in notes if isinstance(note, AttributeValidationNote)), "")
    # Of nested lists the inner number was noted first.
    numbers = "".join(note for note in reversed(notes) if not isinstance(note, AttributeValidationNote))
    if isinstance(error, KeyError):
        return f"{place}: the key {error.args[0]!r} is missing"
    place += name + numbers
    if isinstance(error, ClassValidationError):
        inner = error.exceptions
        unknown = [one for one in inner if isinstance(one, ForbiddenExtraKeysError)]
        return _told((unknown or list(inner))[0], place)  # type: ignore[arg-type]
    if isinstance(error, ForbiddenExtraKeysError):
        key = sorted(error.extra_fields)[0]
        known = [one.name for one in dataclasses.fields(error.cl) if not one.metadata.get("hidden")]
        return f"{place}: unknown key {key!r}; {nearest(key, known)}"
    return f"{place}: {error}"
