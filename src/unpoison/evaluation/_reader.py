"""Plain values, as TOML or JSON gives them, into the frozen dataclasses of a schema, by cattrs.

Values are taken as they are written: "3" is no number, true is no whole number, and one value stands for a
list of one. The first thing that does not fit is an `InputError` in one line that names its place and, for an
unknown key, the nearest known one. cattrs is imported when something is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin

from unpoison.errors import InputError, UnpoisonError, nearest

T = TypeVar("T")
_UNIONS = (Union, types.UnionType)
_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def structured(cls: type[T], values: Any, place: str) -> T:
    """The dataclass `cls` made of plain values.

    Arguments:
        cls: a dataclass, whose fields may be dataclasses, tuples of them, mappings, text and numbers.
        values: a mapping.
        place: what messages call it, such as the path of the file.

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
    converter.register_structure_hook_factory(lambda kind: _origin(kind) in _UNIONS, _union_hook)
    converter.register_structure_hook_factory(lambda kind: _origin(kind) is tuple, _tuple_hook)
    converter.register_structure_hook_func(lambda kind: _origin(kind) is Mapping, _table)
    base = converter.gen_structure_attrs_fromdict

    def section(kind: Any) -> Any:
        read = base(kind)
        return lambda values, _: read(_table(values, kind), kind)

    converter.register_structure_hook_factory(dataclasses.is_dataclass, section)
    return converter


def _origin(kind: Any) -> Any:
    return get_origin(kind)


def _plain(value: Any, kind: type) -> Any:
    numbers: Any = {int: int, float: (int, float)}
    fits = isinstance(value, numbers.get(kind, kind)) and (kind is bool or not isinstance(value, bool))
    if not fits:
        raise InputError(f"must be {_WORDS[kind]}, found {value!r}")
    return kind(value)


def _union_hook(kind: Any, converter: Any) -> Any:
    members = [one for one in get_args(kind) if one is not type(None)]

    def read(value: Any, _: Any) -> Any:
        if value is None and len(members) < len(get_args(kind)):  # not in TOML, but in stored JSON
            return None
        if len(members) == 1:
            return converter.structure(value, members[0])
        for member in members:
            with contextlib.suppress(InputError):
                return _plain(value, member)
        raise InputError(f"must be {' or '.join(_WORDS[member] for member in members)}, found {value!r}")

    return read


def _table(value: Any, kind: Any) -> Any:
    if not isinstance(value, Mapping):
        raise InputError(f"must be a table, found {value!r}")
    return dict(value)


def _tuple_hook(kind: Any, converter: Any) -> Any:
    members = get_args(kind)

    def read(value: Any, _: Any) -> tuple[Any, ...]:
        whole = isinstance(value, list | tuple)
        if members[-1] is Ellipsis:
            entries, kinds = (value, [members[0]] * len(value)) if whole else ([value], [members[0]])
        elif not whole or len(value) != len(members):
            raise InputError(f"must be a list of {len(members)}, found {value!r}")
        else:
            entries, kinds = value, list(members)
        found = []
        for number, (entry, one) in enumerate(zip(entries, kinds, strict=True)):
            try:
                found.append(converter.structure(entry, one))
            except Exception as error:
                if whole:
                    error.add_note(f"[{number}]")
                raise
        return tuple(found)

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
