"""Artefacts on disk, written whole or not at all, and digests of their content.

An artefact is a directory of safetensors, parquet and JSON files. It is written into a temporary directory
beside its place and renamed, so a killed process leaves either the old artefact or the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unpoison.errors import InputError

_WAITS = 20


def canonical_json(value: Any) -> str:
    """The canonical JSON text of a value: sorted keys, no white space, no NaN, numbers of NumPy as Python's.

    >>> canonical_json({"b": 1, "a": [1, 2]})
    '{"a":[1,2],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_plain)


def digest(*parts: bytes | memoryview | str) -> str:
    """A 128-bit hexadecimal BLAKE2b digest of the parts, each preceded by its length.

    >>> digest("ab", "c") == digest("a", "bc")
    False
    """
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str], *, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary directory that becomes `path` when the block ends without an error.

    Nothing is left behind when the block raises (Ctrl-C included). An existing directory at `path` is
    replaced as a whole when `replace`, and is an `InputError` otherwise.
    """
    target = Path(path)
    if target.exists() and not (replace and target.is_dir()):
        raise InputError(f"{target}: exists already; name another directory or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    staging.mkdir()
    try:
        yield staging
        if target.exists():
            retired = staging.with_suffix(".retired")
            target.rename(retired)
            staging.rename(target)
            shutil.rmtree(retired, ignore_errors=True)
        else:
            staging.rename(target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary file path that becomes `path` when the block ends without an error."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        yield staging
        os.replace(staging, target)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def alone(directory: Path, message: str) -> Iterator[None]:
    """Lock a directory, made if need be; before and after, remove what killed processes left half-written.

    Raises:
        InputError: another process has locked it; of this message.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w", encoding="utf-8") as lock:
        with contextlib.suppress(ImportError):  # on Windows
            import fcntl

            # The workers of a process that was killed hold its lock until they notice.
            for waited in range(_WAITS + 1):
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if waited == _WAITS:
                        raise InputError(message) from None
                    time.sleep(0.1)
        _remove_partial(directory)
        try:
            yield
        finally:
            _remove_partial(directory)  # of workers that were stopped because another one failed


def _remove_partial(directory: Path) -> None:
    for leftover in [*directory.glob(".*.partial"), *directory.glob("*/.*.partial")]:
        shutil.rmtree(leftover, ignore_errors=True)
        leftover.unlink(missing_ok=True) if leftover.is_file() else None


def write_json(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """Write a JSON object to `path`, indented, in one step; numbers of NumPy are written as Python's."""
    with atomic_file(path) as staging:
        text = json.dumps(value, indent=2, allow_nan=False, default=_plain)
        staging.write_text(text + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """A NumPy scalar, or a tensor or array of one number, as Python's."""
    if getattr(value, "ndim", None) != 0:
        raise TypeError(f"{type(value).__name__} cannot be written as JSON")
    return value.item()


def read_bytes(path: str | os.PathLike[str], where: str | None = None) -> bytes:
    """The content of a file, called `where` in messages; an `InputError` where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(f"{where or path}: no such file; check the path") from None
    except OSError as error:
        raise InputError(f"{where or path}: cannot be read ({error.strerror or error})") from None


def json_in(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file; an `InputError` where it cannot be read."""
    content = read_bytes(path)
    try:
        return json.loads(content)
    except ValueError as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from None


def read_record(path: str | os.PathLike[str], version: int, what: str) -> dict[str, Any]:
    """A JSON object of an artefact, in the format of this version.

    Arguments:
        path: the file; messages name its directory.
        version: what is expected under its key "format".
        what: the artefacts, such as "findings".

    Raises:
        InputError: there is none, or it has another format.
    """
    record = read_json(path)
    if record.get("format") != version:
        raise InputError(
            f"{Path(path).parent}: format {record.get('format')!r} of {what} is not known, expected "
            f"{version}; make them anew with this version of unpoison"
        )
    return record


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: there is no such file, or it does not hold a JSON object.
    """
    value = json_in(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
