"""Untrusted pickles, read without running them.

A pickle is a program: it may import any function and call it. This reader imports nothing. Each name on a
short list stands for a replacement of ours, and a pickle that imports any other name is refused, with that
name in the message, before anything is called. The list holds what NumPy arrays and plain containers need.

NumPy's own functions are not used, because they trust their input: the state of a `numpy.dtype` can be forged
so that bytes of the file are read as pointers. The replacements accept plain numbers and text, and take the
content of an array only from bytes in the file. They are immutable, so a pickle cannot alter them for later
ones.
"""

from __future__ import annotations

import io
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, final

import numpy as np

from unpoison._artefacts import atomic_file, read_bytes
from unpoison.errors import InputError, one_line

Admitted = Mapping[tuple[str, str], Callable[..., Any] | type]
"""What a pickle may import, by module and name, and what it is given instead."""


def read_pickle(
    path: str | os.PathLike[str],
    *,
    admit: Admitted | None = None,
    encoding: str = "bytes",
) -> Any:
    """Read one pickle that holds NumPy arrays, numbers, text and plain containers of them.

    Arguments:
        path: the file.
        admit: what else the pickle may import, e.g. a stand-in for PIL's images. It is called with
            arguments that the pickle chooses and must be harmless for all of them. A class must define
            `__setstate__`: without it, a pickle may set any attribute of an instance, or of the class itself.
        encoding: how 8-bit strings written by Python 2 are read.

    Raises:
        InputError: the file cannot be read, is cut short, or asks for anything that is not admitted.
    """
    return unpickle(str(path), read_bytes(path), admit=admit, encoding=encoding)


def write_pickle(path: str | os.PathLike[str], value: Any) -> None:
    """Write a pickle for a tool that reads nothing else; the file appears whole or not at all.

    Only arrays, pictures and plain containers are written so, in protocol 4.

    Raises:
        InputError: the file cannot be written.
    """
    target = Path(path)
    try:
        with atomic_file(target) as staging:
            staging.write_bytes(pickle.dumps(value, protocol=4))
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror or error})") from None


def unpickle(where: str, content: bytes, *, admit: Admitted | None = None, encoding: str = "bytes") -> Any:
    """Read one pickle from bytes; see `read_pickle`. `where` is what to call it in messages."""
    unpickler = _Unpickler(content, {**_ARRAYS, **(admit or {})}, encoding)
    try:
        return unpickler.load()
    except _RefusedError as refused:
        raise InputError(
            f"{where}: refused: the pickle asks for {refused}, and only arrays and plain containers are "
            "admitted; do not trust this file"
        ) from None
    # A damaged pickle may raise anything.
    except Exception as error:
        raise InputError(
            f"{where}: cannot be read as a pickle of arrays ({one_line(error)}); it may be cut short"
        ) from None


class _RefusedError(Exception):
    """The pickle asks for what is not admitted; the message names it."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, admitted: Admitted, encoding: str) -> None:
        super().__init__(io.BytesIO(content), encoding=encoding)
        self._admitted = admitted

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._admitted[module, name]
        except KeyError:
            raise _RefusedError(ascii(f"{module}.{name}")[1:-1][:100]) from None

    def persistent_load(self, identifier: Any) -> Any:
        raise _RefusedError("an object outside the file")


@final
class _StandIn:
    """An immutable callable that a pickle may be given."""

    __slots__ = ("_call",)
    _call: Callable[..., Any]

    def __init__(self, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "_call", call)

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setattr__(self, name: str, value: Any) -> None:
        raise _RefusedError(f"a change of what it imported ({ascii(name)[:50]})")

    def __setstate__(self, state: Any) -> None:
        raise _RefusedError("a change of what it imported")


_NUMBER_OR_TEXT = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248]|c8|c16|[SU][0-9]{1,6})")


@final
class _Type:
    """Replaces `numpy.dtype`: the name of a plain type, and its byte order."""

    __slots__ = ("plain",)

    def __init__(self, name: Any, *_: Any) -> None:
        text = name.decode("latin-1") if isinstance(name, bytes) else name
        if not isinstance(text, str) or not _NUMBER_OR_TEXT.fullmatch(text):
            raise _RefusedError(f"arrays of type {ascii(name)[:50]}")
        self.plain = np.dtype(text)

    def __setstate__(self, state: Any) -> None:
        order: Any = state[1].decode("latin-1") if isinstance(state[1], bytes) else state[1]
        if order not in ("<", ">", "=", "|"):
            raise _RefusedError("an unknown byte order")
        self.plain = self.plain.newbyteorder(order)


@final
class _Array(np.ndarray[Any, Any]):
    """An array whose content comes from bytes of the file."""

    def __setstate__(self, state: Any, /) -> None:
        _version, shape, element, fortran_order, content = state
        filled = _from_bytes(content, element, shape, "F" if fortran_order else "C")
        # NumPy accepts more here than its annotations say.
        rebuilt: Any = (1, filled.shape, filled.dtype, bool(fortran_order), filled.tobytes("A"))
        super().__setstate__(rebuilt)


def _from_bytes(content: Any, element: Any, shape: Any, order: Any = "C") -> np.ndarray[Any, Any]:
    if isinstance(content, str):  # Python 2 bytes read as text
        content = content.encode("latin-1")
    if not isinstance(element, _Type) or not isinstance(content, bytes | bytearray):
        raise _RefusedError("an array whose content is not plain bytes")
    filled: np.ndarray[Any, Any] = np.frombuffer(content, element.plain).copy()
    return filled.reshape(tuple(map(int, shape)), order="F" if order == "F" else "C")


def _scalar(element: Any, content: Any = b"") -> Any:
    return _from_bytes(content, element, (1,))[0]


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise _RefusedError("an unusual text encoding")
    return text.encode("latin-1")


def _empty_array(*_: Any) -> _Array:
    return _Array((0,), np.uint8)


def _nothing(*_: Any) -> None:
    raise _RefusedError("an array made from scratch")


def _admitted() -> dict[tuple[str, str], Callable[..., Any]]:
    names: dict[tuple[str, str], Callable[..., Any]] = {
        ("numpy", "ndarray"): _nothing,  # only ever named, as an argument of _reconstruct
        ("numpy", "dtype"): _Type,
        ("_codecs", "encode"): _encode,
        ("collections", "OrderedDict"): lambda pairs=(): OrderedDict(pairs),
    }
    for core in ("numpy.core", "numpy._core"):
        names[f"{core}.multiarray", "_reconstruct"] = _empty_array
        names[f"{core}.multiarray", "scalar"] = _scalar
        names[f"{core}.numeric", "_frombuffer"] = _from_bytes
    for builtins in ("builtins", "__builtin__"):
        names[builtins, "set"] = lambda members=(): set(members)
        names[builtins, "frozenset"] = lambda members=(): frozenset(members)
    return {name: _StandIn(call) for name, call in names.items()}


_ARRAYS = MappingProxyType(_admitted())
