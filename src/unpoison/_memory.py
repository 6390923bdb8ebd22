"""How much memory there is, how much may be taken, and what to say where it is not enough.

Every verb estimates what it will take before it starts, by a function beside the code that it describes, and
calls `check_memory`, which refuses in one line that says what would fit. What may be taken is
`memory` of the verb, else nine tenths of what is free: of the machine, of the process's control groups and of
its limit on address space, or of the GPU. An allocation that fails all the same becomes such a line by
`explained`.

Importing this module does not import torch.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Final

from unpoison.errors import InputError, InsufficientMemoryError

SHARE: Final = 0.9
"""The share of free memory that a verb may take by default."""
_UNITS: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY: Final = {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}
_NO_LIMIT: Final = 1 << 60
# How torch, oneDNN, BLAS and the C++ library say that there is no memory left.
_FAILURES: Final = (
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "out of memory",
    "bad_alloc",
    "could not create a memory",
    "could not create a primitive",
)

_MEMORY: ContextVar[int | None] = ContextVar("memory", default=None)


def peak_bytes(device: object = "cpu") -> int:
    """The peak resident memory of the process or, on CUDA, of its tensors, in bytes; 0 on Windows.

    Arguments:
        device: a `torch.device`, or its name.

    >>> peak_bytes() > 1_000_000
    True
    """
    if str(device).startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(str(device))
    try:
        import resource
    except ImportError:  # on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_memory(device: object = "cpu") -> int | None:
    """Bytes that can be allocated without swapping; None where that is not known (as on Windows).

    Arguments:
        device: a `torch.device`, or its name.
    """
    if str(device).startswith("cuda"):
        import torch

        free = torch.cuda.mem_get_info(str(device))[0]
        return free + torch.cuda.memory_reserved(str(device)) - torch.cuda.memory_allocated(str(device))
    known = [one for one in (_machine_free(), _group_free(), _address_space_free()) if one is not None]
    return max(0, min(known)) if known else None


def as_bytes(memory: int | str, *, called: str = "memory") -> int:
    """A number of bytes, or text such as "8GB" (10^9), "500MB" or "8GiB" (2^30).

    Arguments:
        memory: what was given.
        called: its name in messages.

    Raises:
        InputError: it is neither, or not positive.

    >>> as_bytes("1.5GB"), as_bytes("2 MiB"), as_bytes(4096)
    (1500000000, 2097152, 4096)
    """
    found = None
    if isinstance(memory, int) and not isinstance(memory, bool):
        found = memory
    elif isinstance(memory, str):
        parts = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([kmgt]?i?)b?\s*", memory.lower())
        if parts is not None and (parts[2] in _UNITS or parts[2] in _BINARY):
            found = int(float(parts[1]) * (_UNITS | _BINARY)[parts[2]])
    if found is None or found < 1:
        raise InputError(f"{called}: expected bytes such as 8000000000, or '8GB', found {memory!r}")
    return found


def in_words(count: float) -> str:
    """A number of bytes for people.

    >>> in_words(12_300_000_000), in_words(431_000_000), in_words(1_300)
    ('12.3 GB', '431 MB', '2 KB')
    """
    if count >= 1e9:
        return f"{count / 1e9:,.1f} GB"
    return f"{count / 1e6:,.0f} MB" if count >= 1e6 else f"{max(0, -(-count // 1000)):.0f} KB"


@contextlib.contextmanager
def limited(memory: int | str | None) -> Iterator[None]:
    """Within the block, what is called may take so many bytes; with None, as many as before.

    Raises:
        InputError: `memory` is no number of bytes.
    """
    token = _MEMORY.set(_MEMORY.get() if memory is None else as_bytes(memory))
    try:
        yield
    finally:
        _MEMORY.reset(token)


def allowed_memory(device: object = "cpu") -> int:
    """Bytes that may be taken beyond what is taken now: those of `limited`, else `SHARE` of what is free."""
    given = _MEMORY.get()
    if given is not None:
        return given
    free = free_memory(device)
    return _NO_LIMIT if free is None else int(SHARE * free)


def check_memory(
    what: str, parts: Mapping[str, float], *, advice: str | Callable[[int], str], device: object = "cpu"
) -> None:
    """Refuse what will not fit.

    Arguments:
        what: is about to start, such as "trace".
        parts: bytes by what takes them, at the time when most is taken.
        advice: what would fit, or a function that says so, given the bytes that may be taken.
        device: where.

    Raises:
        InsufficientMemoryError: the parts take more together than may be taken.
    """
    allowed, total = allowed_memory(device), sum(parts.values())
    if total <= allowed:
        return
    most = sorted(parts, key=parts.__getitem__, reverse=True)
    listed = ", ".join(f"{name} {in_words(parts[name])}" for name in most if parts[name] >= 0.01 * total)
    told = advice if isinstance(advice, str) else advice(allowed)
    raise InsufficientMemoryError(
        f"{what}: would take {in_words(total)} of memory ({listed}), {_source(device, allowed)}; {told}"
    )


@contextlib.contextmanager
def explained(what: str, advice: str) -> Iterator[None]:
    """Turn a failed allocation within the block into an error of one line.

    Raises:
        InsufficientMemoryError: an allocation failed.
    """
    try:
        yield
    except InsufficientMemoryError:
        raise
    except Exception as error:
        if not is_allocation_failure(error):
            raise
        raise InsufficientMemoryError(f"{what}: out of memory; {advice}") from error


def is_allocation_failure(error: BaseException) -> bool:
    """Whether an error, or one that it goes back to, says that memory could not be allocated."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError) or (isinstance(seen, OSError) and seen.errno == errno.ENOMEM):
            return True
        text = str(seen).lower()
        if isinstance(seen, RuntimeError) and any(words in text for words in _FAILURES):
            return True  # torch.OutOfMemoryError is one
        seen = seen.__cause__
    return False


def _source(device: object, allowed: int) -> str:
    if _MEMORY.get() is not None:
        return f"but memory is set to {in_words(allowed)}"
    place = " on the GPU" if str(device).startswith("cuda") else ""
    return f"but {in_words(allowed)} may be taken (nine tenths of what is free{place})"


def _machine_free() -> int | None:
    """`MemAvailable`, or the size of the memory where that is all that is known."""
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _group_free(own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What the control groups of this process have left: of version 2, and of version 1."""
    try:
        lines = own.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    free = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            places, names = [root, root / "unified"], ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            places, names = [root / "memory"], ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        for place in places:
            # Within a container its own group is often mounted as the root.
            for group in {place / path.lstrip("/"), *(place / path.lstrip("/")).parents, place}:
                left = _left(group, *names) if group.is_relative_to(root) else None
                free += [] if left is None else [left]
    return min(free, default=None)


def _left(group: Path, limit: str, usage: str, prefix: str) -> int | None:
    """The limit of a control group less what is used and cannot be reclaimed; None without a limit."""
    try:
        most = int((group / limit).read_text())
        if most >= _NO_LIMIT:
            return None
        used = int((group / usage).read_text())
        stat = (group / "memory.stat").read_text()
    except (OSError, ValueError):  # no such group, or no limit: "max"
        return None
    pairs = (line.split() for line in stat.splitlines())
    cached = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
    return most - used + sum(cached.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))


def _address_space_free() -> int | None:
    """What `ulimit -v` leaves."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit == resource.RLIM_INFINITY:
            return None
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError, ValueError):
        return None
    return limit - pages * os.sysconf("SC_PAGE_SIZE")
