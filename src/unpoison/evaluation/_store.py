"""`Store`: every artefact of a benchmark, stored once under the hash of what made it.

    STORE/artefacts/ab/ab12.../     an artefact: what its stage wrote, and stage.json, which says what made it
    STORE/recipes/NAME.json         which rows the recipe's table is made of
    STORE/tables/NAME.parquet       those rows in one file, for quick reading; only a copy
    STORE/failures/KEY.json         what went wrong in a stage; removed when the stage succeeds
    STORE/checkpoints/KEY/          the state of a long stage that was killed; removed likewise

A stage is a pure function of its configuration, its inputs' artefacts and the code that it runs, and its key
is the hash of all three. An artefact appears whole or not at all, so a process may be killed at any moment;
stage.json holds a digest of every file, so damage is noticed and the stage done again. It also holds the
commit that the code was of.

This module does not import torch.
"""

from __future__ import annotations

import contextlib
import importlib
import shutil
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, final

from unpoison._artefacts import alone, atomic_directory, canonical_json, digest, read_json, write_json
from unpoison._code import commit
from unpoison._memory import peak_bytes
from unpoison.errors import InputError

SCHEMA = 2
_RECORD = "stage.json"
Work = Callable[[Mapping[str, Any], Mapping[str, Path], Mapping[str, Any], Path], None]
"""A stage's function: configuration, inputs' artefacts, surroundings, and the directory to write into.

`surroundings["checkpoints"]` is a directory in which it may keep its state, to resume from after a kill.
"""
State = Literal["sound", "missing", "damaged"]


@final
@dataclass(frozen=True)
class Stage:
    """One step of a trial, shared by all trials that need it.

    Arguments:
        kind: craft, train, calibrate, find, heal or measure.
        function: `module:function`, a `Work`.
        configuration: everything that decides the result, as JSON values.
        inputs: the keys of the stages whose artefacts it reads, by the function's name for them.
        surroundings: where data lies and the like: what does not decide the result and is not hashed.
        code: a digest of the source that it runs.
    """

    kind: str
    function: str
    configuration: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)
    surroundings: Mapping[str, Any] = field(default_factory=dict)
    code: str = ""

    @cached_property
    def key(self) -> str:
        """The name of its artefact."""
        return digest(canonical_json(self.identity))

    @property
    def identity(self) -> dict[str, Any]:
        """What the key is the hash of."""
        return {
            "schema": SCHEMA,
            "code": self.code,
            "kind": self.kind,
            "function": self.function,
            "configuration": dict(self.configuration),
            "inputs": dict(self.inputs),
        }


@final
@dataclass(frozen=True)
class Outcome:
    """How a stage went.

    Arguments:
        key: of the stage.
        seconds: it took; 0 when its artefact was there already.
        cached: whether it was.
        error: one line, None when all went well.
    """

    key: str
    seconds: float = 0.0
    cached: bool = False
    error: str | None = None


@final
@dataclass(frozen=True)
class Store:
    """A directory of artefacts; made when something is written to it.

    Arguments:
        root: the directory.
    """

    root: Path

    def place(self, key: str) -> Path:
        """Where the artefact `key` lies, or would."""
        return self.root / "artefacts" / key[:2] / key

    def record(self, key: str) -> dict[str, Any]:
        """What made the artefact `key`, with its time and memory.

        Raises:
            InputError: it is not there, or damaged.
        """
        return read_json(self.place(key) / _RECORD)

    def state(self, key: str) -> State:
        """Whether the artefact is there, with every file as it was written. Cost: reading all of it."""
        place = self.place(key)
        if not place.is_dir():
            return "missing"
        with contextlib.suppress(InputError, OSError, KeyError):
            if _digests(place) == self.record(key)["digests"]:
                return "sound"
        return "damaged"

    @contextlib.contextmanager
    def writing(self, stage: Stage) -> Iterator[Path]:
        """Yield a directory that becomes the stage's artefact when the block ends without an error."""
        started = time.perf_counter()
        device = str(stage.surroundings.get("device", "cpu"))
        _reset_peak(device)
        with atomic_directory(self.place(stage.key)) as staging:
            yield staging
            record = {
                **stage.identity,
                "commit": commit(),
                "digests": _digests(staging),
                "seconds": round(time.perf_counter() - started, 6),
                "peak_bytes": peak_bytes(device),
            }
            write_json(staging / _RECORD, record)

    def failed(self, key: str) -> Path:
        """Where a failure of the stage is recorded."""
        return self.root / "failures" / f"{key}.json"

    def fail(self, stage: Stage, error: str, details: str = "") -> None:
        """Record a failure of the stage."""
        record = {"key": stage.key, **stage.identity, "error": error, "traceback": details}
        write_json(self.failed(stage.key), record)

    def errors(self, keys: Iterable[str]) -> tuple[str, ...]:
        """What went wrong in those of these stages that failed, a line each."""
        failed = map(self.failed, keys)
        return tuple(read_json(path)["error"] for path in failed if path.exists())

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Lock the store for one sweep, and remove what a killed one left half-written.

        Raises:
            InputError: another process has locked it.
        """
        with alone(self.root, f"{self.root}: another sweep is using this store; wait for it, or end it"):
            for leftover in self.root.glob("artefacts/*/.*.*"):
                shutil.rmtree(leftover, ignore_errors=True)
            yield


def perform(root: str, stage: Stage) -> Outcome:
    """Do a stage unless its artefact is there; an error is recorded in the outcome and in the store.

    Executors run this function in their workers.
    """
    store = Store(Path(root))
    if store.state(stage.key) == "sound":
        return Outcome(stage.key, cached=True)
    started = time.perf_counter()
    try:
        module, _, name = stage.function.partition(":")
        work: Work = getattr(importlib.import_module(module), name)
        started = time.perf_counter()  # importing torch is not the stage's cost
        inputs = {name: store.place(key) for name, key in stage.inputs.items()}
        checkpoints = store.root / "checkpoints" / stage.key
        surroundings = {**stage.surroundings, "checkpoints": str(checkpoints)}
        try:
            with store.writing(stage) as staging:
                work(stage.configuration, inputs, surroundings, staging)
            shutil.rmtree(checkpoints, ignore_errors=True)
        except OSError:
            # Another worker may have been faster, one that was taken for dead; its artefact is the same.
            if store.state(stage.key) != "sound":
                raise
    except Exception as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())
        store.fail(stage, line, traceback.format_exc())
        return Outcome(stage.key, time.perf_counter() - started, error=line)
    store.failed(stage.key).unlink(missing_ok=True)
    return Outcome(stage.key, time.perf_counter() - started)


def _digests(place: Path) -> dict[str, str]:
    files = {path.relative_to(place).as_posix(): path for path in place.rglob("*") if path.is_file()}
    return {name: digest(path.read_bytes()) for name, path in sorted(files.items()) if name != _RECORD}


def _reset_peak(device: str) -> None:
    """Reset the peak memory, so that the next stage has its own."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return
    # Only Linux can reset it; elsewhere the peak is that of the worker so far.
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as control:
        control.write("5")
