"""`Decisions`: what a person has decided about training examples, kept as a log that only grows.

One JSON object a line. The first line names the training set; every other one says when and what:

    {"format": 1, "fingerprint": "ab12...", "examples": 5000}
    {"at": "2026-11-29T22:31:05.123Z", "do": "decide", "as": "blame", "examples": [17, 341]}
    {"at": "2026-11-29T22:31:09.020Z", "do": "undo"}
    {"at": "2026-11-29T22:40:12.456Z", "do": "note", "what": "heal", "facts": {"removed": 2}}

The decisions that hold, what can be undone or done again, and the audit are all read off the lines, in their
order. A line is one write to a file opened for appending, under a lock, and reaches the disk before the call
returns, so that several processes may write to one log. A line that was cut off when its writer was killed is
closed by the next writer, passed over, and counted.

Cost: memory for one byte an example and the log's own lists; an append is O(examples decided).
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Literal, final

import numpy as np
import numpy.typing as npt

from unpoison.errors import InputError, MismatchError

_locks: ModuleType | None
try:  # Windows has no such module; there two processes must not write to one log.
    import fcntl as _locks
except ImportError:
    _locks = None

Verdict = Literal["undecided", "blame", "clear", "unsure"]
VERDICTS: Final[tuple[Verdict, ...]] = ("undecided", "blame", "clear", "unsure")
"""In the order of their codes in `Decisions.codes`."""
_FORMAT = 1
_HEAD = b'{"format":'


@final
@dataclass(frozen=True)
class Entry:
    """One line of the log.

    Arguments:
        at: when, in UTC, as ISO 8601 has it.
        do: "decide", "undo", "redo", or "note" for what else was done (a trace, a heal, an export).
        verdict: what was decided, for "decide".
        examples: about which examples, for "decide".
        what: what else was done, for "note".
        facts: about that, as JSON values.
    """

    at: str
    do: Literal["decide", "undo", "redo", "note"]
    verdict: Verdict | None = None
    examples: tuple[int, ...] = ()
    what: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As the line of the log has it."""
        value: dict[str, Any] = {"at": self.at, "do": self.do}
        if self.do == "decide":
            value |= {"as": self.verdict, "examples": list(self.examples)}
        if self.do == "note":
            value |= {"what": self.what, "facts": dict(self.facts)}
        return value


@dataclass(frozen=True)
class _Step:
    """What one decision changed."""

    rows: npt.NDArray[np.int64]
    before: npt.NDArray[np.uint8]
    after: int


@final
class Decisions:
    """The decisions about one training set, read from their log and written to it.

    Arguments:
        path: of the log; begun when it is not there.
        fingerprint: of the training set.
        examples: how many it has.

    Raises:
        InputError: the file cannot be read, or is no log of decisions.
        MismatchError: the log is about another training set.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     decisions = Decisions(Path(folder) / "decisions.jsonl", "ab12", 10)
    ...     decisions.decide([3, 5], "blame")
    ...     decisions.decide([5], "clear")
    ...     _ = decisions.undo()
    ...     decisions.decided("blame").tolist()
    [3, 5]
    """

    def __init__(self, path: str | os.PathLike[str], fingerprint: str, examples: int) -> None:
        self.path = Path(path)
        self.fingerprint = fingerprint
        self.codes: npt.NDArray[np.uint8] = np.zeros(examples, np.uint8)
        self.damaged = 0
        self._entries: list[Entry] = []
        self._done: list[_Step] = []
        self._undone: list[_Step] = []
        self._read = 0
        self._guard = threading.RLock()
        with self._locked(os.O_CREAT) as file:
            # A first line that was cut off says nothing yet.
            if b"\n" not in (begun := _bytes_at(file, 0)) and _HEAD.startswith(begun[: len(_HEAD)]):
                os.ftruncate(file, 0)
                self._write(file, {"format": _FORMAT, "fingerprint": fingerprint, "examples": examples})
            self._catch_up(file)

    def __len__(self) -> int:
        """How many training examples there are."""
        return len(self.codes)

    @property
    def can_undo(self) -> bool:
        """Whether there is a decision to take back."""
        return bool(self._done)

    @property
    def can_redo(self) -> bool:
        """Whether there is a decision that was taken back and nothing was decided since."""
        return bool(self._undone)

    @property
    def audit(self) -> tuple[Entry, ...]:
        """Every line of the log, in its order."""
        return tuple(self._entries)

    def decided(self, verdict: Verdict) -> npt.NDArray[np.int64]:
        """Int64[k]: the examples about which this is decided, ascending."""
        return np.flatnonzero(self.codes == VERDICTS.index(verdict)).astype(np.int64)

    def verdict_of(self, index: int) -> Verdict:
        """What is decided about one example."""
        return VERDICTS[int(self.codes[index])]

    def counts(self) -> dict[Verdict, int]:
        """How many examples there are of each verdict."""
        found = np.bincount(self.codes, minlength=len(VERDICTS)).tolist()
        return dict(zip(VERDICTS, found, strict=True))

    def decide(self, examples: Iterable[int] | npt.NDArray[np.integer[Any]], verdict: Verdict) -> None:
        """Decide about some examples, together: one undo takes all of it back.

        Raises:
            InputError: there is no such example or verdict, or the log cannot be written, such as on a full
                disk; nothing is decided then.
        """
        if verdict not in VERDICTS:
            raise InputError(f"decide: {verdict!r} is none of {', '.join(VERDICTS)}")
        given = examples if isinstance(examples, np.ndarray) else list(examples)
        rows = np.unique(np.asarray(given, dtype=np.int64))
        if len(rows) and not 0 <= rows[0] <= rows[-1] < len(self):
            raise InputError(f"decide: examples are 0..{len(self) - 1}, found {rows[0]}..{rows[-1]}")
        if len(rows):
            self._append({"do": "decide", "as": verdict, "examples": rows.tolist()})

    def undo(self) -> bool:
        """Take the last decision back that holds; whether there was one."""
        return self._append({"do": "undo"}, unless=lambda: not self._done)

    def redo(self) -> bool:
        """Decide again what was taken back last; whether there was such a decision."""
        return self._append({"do": "redo"}, unless=lambda: not self._undone)

    def note(self, what: str, **facts: Any) -> None:
        """Put down what else was done; it cannot be undone."""
        self._append({"do": "note", "what": what, "facts": facts})

    def refresh(self) -> bool:
        """Read what others have appended; whether there was anything."""
        with self._guard, self._locked() as file:
            known = len(self._entries)
            self._catch_up(file)
            return len(self._entries) > known

    def _append(self, what: Mapping[str, Any], unless: Any = None) -> bool:
        with self._guard, self._locked() as file:
            self._catch_up(file)
            if unless is not None and unless():
                return False
            now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            self._write(file, {"at": now, **what})
            self._catch_up(file)
            return True

    @contextlib.contextmanager
    def _locked(self, create: int = 0) -> Iterator[int]:
        """The log, opened to read and to append; no other process has it locked."""
        try:
            if create:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_RDWR | os.O_APPEND | create, 0o644)
            try:
                if _locks is not None:
                    _locks.flock(file, _locks.LOCK_EX)
                yield file
            finally:
                os.close(file)  # which also gives the lock up
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror or error})") from None

    def _write(self, file: int, value: Mapping[str, Any]) -> None:
        """Append a line, or nothing of it where that fails."""
        line = json.dumps(value, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        size = os.fstat(file).st_size
        if size and _bytes_at(file, size - 1) != b"\n":
            line = b"\n" + line  # closes the line of a writer that was killed
        written = 0
        try:
            while written < len(line):
                written += os.write(file, line[written:])
            os.fsync(file)
        except OSError:
            os.ftruncate(file, size)
            raise

    def _catch_up(self, file: int) -> None:
        """Take in the whole lines that have not been read; what follows the last of them is not finished."""
        size = os.fstat(file).st_size
        if size < self._read:
            raise InputError(f"{self.path}: has become shorter; a log of decisions is only ever appended to")
        new = _bytes_at(file, self._read)
        end = new.rfind(b"\n") + 1
        first = self._read == 0
        self._read += end
        for line in new[:end].splitlines():
            if first:
                self._check_head(line)
                first = False
            elif line:
                self._take(line)

    def _check_head(self, line: bytes) -> None:
        try:
            head = json.loads(line)
            found = head["format"], head["fingerprint"], head["examples"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{self.path}: is no log of decisions; name another place") from None
        if found[0] != _FORMAT:
            raise InputError(f"{self.path}: format {found[0]!r} is not known; this version reads {_FORMAT}")
        if found[1:] != (self.fingerprint, len(self)):
            raise MismatchError(
                f"{self.path}: is about another training set ({found[2]} examples); name another place"
            )

    def _take(self, line: bytes) -> None:
        try:
            entry = self._entry(json.loads(line))
        except (ValueError, KeyError, TypeError):
            self.damaged += 1
            return
        if (entry.do == "undo" and not self._done) or (entry.do == "redo" and not self._undone):
            return
        self._entries.append(entry)
        if entry.do == "decide":
            rows = np.asarray(entry.examples, np.int64)
            step = _Step(rows, self.codes[rows], VERDICTS.index(entry.verdict or "undecided"))
            self._done.append(step)
            self._undone.clear()
            self.codes[rows] = step.after
        elif entry.do == "undo":
            step = self._done.pop()
            self._undone.append(step)
            self.codes[step.rows] = step.before
        elif entry.do == "redo":
            step = self._undone.pop()
            self._done.append(step)
            self.codes[step.rows] = step.after

    def _entry(self, value: Any) -> Entry:
        """A line as an entry; a ValueError, KeyError or TypeError where it is none."""
        do, at = value["do"], value["at"]
        if do not in ("decide", "undo", "redo", "note") or not isinstance(at, str):
            raise ValueError(do)
        if do == "note":
            return Entry(at, do, what=str(value["what"]), facts=dict(value["facts"]))
        if do != "decide":
            return Entry(at, do)
        examples, verdict = tuple(value["examples"]), value["as"]
        whole = all(type(index) is int and 0 <= index < len(self) for index in examples)
        if verdict not in VERDICTS or not whole:
            raise ValueError(verdict)
        return Entry(at, do, verdict, examples)


def _bytes_at(file: int, start: int) -> bytes:
    """What a file holds from `start` on."""
    parts = []
    while part := os.pread(file, 1 << 20, start):
        parts.append(part)
        start += len(part)
    return b"".join(parts)
