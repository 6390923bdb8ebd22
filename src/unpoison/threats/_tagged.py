"""Objects that are stored as JSON and tensors, and restored by the name of their kind.

A family (`Trigger`, `Goal`, `Perturbation`) derives from `Tagged` itself; its members state their kind where
they are defined: `class PatchTrigger(Trigger, kind="patch")`. A new member that is a dataclass of plain
values and tensors needs no more to be saved and loaded. One from outside unpoison has to be imported before
something that contains it is loaded.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar, Self, cast

from torch import Tensor

from unpoison.errors import InputError, one_line


class Tagged(ABC):
    """Stored as a JSON object with a `kind`, and named tensors."""

    kind: ClassVar[str]
    _members: ClassVar[dict[str, type[Tagged]]]

    def __init_subclass__(cls, *, kind: str | None = None) -> None:
        super().__init_subclass__()
        if Tagged in cls.__bases__:
            cls._members = {}
        if kind is None:
            return
        if kind in cls._members:
            raise TypeError(f"{cls.__name__}: the kind {kind!r} is taken by {cls._members[kind].__name__}")
        cls.kind = kind
        cls._members[kind] = cls

    def configuration(self) -> dict[str, Any]:
        """Everything but the tensors, ready for JSON: by default the fields of the dataclass."""
        values = {one.name: getattr(self, one.name) for one in fields(cast(Any, self))}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if not isinstance(value, Tensor)
        }

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, possibly none; names may contain dots."""
        values = {one.name: getattr(self, one.name) for one in fields(cast(Any, self))}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    @classmethod
    def restore(cls, configuration: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The object that `configuration` and `tensors` describe."""
        plain = {
            name: tuple(value) if isinstance(value, list) else value for name, value in configuration.items()
        }
        return cls(**plain, **tensors)

    def to_json(self) -> dict[str, Any]:
        """The configuration and the kind; the tensors are stored separately."""
        return {"kind": self.kind, **self.configuration()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The member of this family that wrote `value` and `tensors`.

        Raises:
            InputError: the kind is unknown, or something is missing or of the wrong type.
        """
        kind = value.get("kind")
        member = cls._members.get(kind) if isinstance(kind, str) else None
        if member is None or not issubclass(member, cls):
            known = ", ".join(sorted(cls._members))
            raise InputError(
                f"{cls.__name__}: unknown kind {kind!r} (known: {known}); import the module that defines it"
            )
        configuration = {key: part for key, part in value.items() if key != "kind"}
        try:
            return member.restore(configuration, tensors)
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{cls.__name__}: cannot restore a {kind!r} ({one_line(error)})") from None


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as `prefix.name`, for an object that contains another."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that `prefixed` put under `prefix`, by their own names."""
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
