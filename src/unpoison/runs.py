"""`run.json`: what was run, with which code, on what, how long it took and what came of it.

`RunRecord` reads and writes the file; nothing else does. A `Recorder` collects what a run finds out and makes
the record. `run.schema.json` beside this file is the schema of what may stand in it. This module does not
import torch.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from datetime import UTC, datetime
from importlib import metadata, resources
from pathlib import Path
from typing import Any, final

from unpoison._artefacts import read_json, write_json
from unpoison._code import code_digest, commit
from unpoison._memory import peak_bytes
from unpoison.errors import InputError

SCHEMA = 1
RECORD = "run.json"


@final
@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run of the command, as `run.json` keeps it. docs/command.md says what each field means."""

    verb: str
    configuration: Mapping[str, Any]
    seed: int
    versions: Mapping[str, str | None]
    code: Mapping[str, str | None]
    device: Mapping[str, Any]
    started: str
    seconds: Mapping[str, float]
    peak_memory_bytes: int
    results: Mapping[str, Any]
    artefacts: Mapping[str, str]
    schema: int = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """As JSON values: paths are strings, and what is not a finite number is null."""
        values = {field.name: json_value(getattr(self, field.name)) for field in fields(self)}
        return {"schema": self.schema, **values}

    def save(self, directory: Path) -> None:
        """Write `run.json` into a directory."""
        write_json(directory / RECORD, self.to_dict())

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> RunRecord:
        """Read the `run.json` of a run directory.

        Raises:
            InputError: there is none, it is damaged, or a newer version of unpoison wrote it.
        """
        path = Path(directory) / RECORD
        value = read_json(path)
        if value.get("schema") != SCHEMA:
            raise InputError(
                f"{path}: schema {value.get('schema')!r} is not known; this version reads {SCHEMA}"
            )
        try:
            return cls(**value)
        except TypeError as error:
            raise InputError(f"{path}: not a record of a run ({error})") from None


def run_schema() -> dict[str, Any]:
    """The JSON schema that every `run.json` follows.

    >>> run_schema()["properties"]["schema"]
    {'const': 1, ...}
    """
    text = resources.files("unpoison").joinpath("run.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def json_value(value: Any) -> Any:
    """A value as JSON knows it.

    >>> json_value({"rate": float("nan"), "path": Path("a") / "b", "pair": (1, 2.5)})
    {'rate': None, 'path': 'a/b', 'pair': [1, 2.5]}
    """
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): json_value(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [json_value(entry) for entry in value]
    if is_dataclass(value) and not isinstance(value, type):
        return json_value(asdict(value))
    raise TypeError(f"no JSON for {type(value).__name__}")


@final
class Recorder:
    """Collects the results of one run.

    Arguments:
        verb: its name.
        configuration: all of its options.
        seed: the one that everything random is derived from.
        since: when the run began, by `time.perf_counter`; now when None.
    """

    def __init__(
        self, verb: str, configuration: Mapping[str, Any], seed: int, since: float | None = None
    ) -> None:
        self.verb, self.configuration, self.seed = verb, configuration, seed
        self.since = time.perf_counter() if since is None else since
        self.started = datetime.now(UTC)
        self.seconds: dict[str, float] = {}
        self.results: dict[str, Any] = {}
        self.artefacts: dict[str, str] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the block's seconds to the stage `name`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def record(self) -> RunRecord:
        """What is known so far."""
        seconds = {name: round(value, 4) for name, value in self.seconds.items()}
        return RunRecord(
            verb=self.verb,
            configuration=self.configuration,
            seed=self.seed,
            versions=versions(),
            code={"digest": code_digest(), "commit": commit()},
            device=device_facts(),
            started=self.started.isoformat(timespec="seconds").replace("+00:00", "Z"),
            seconds={**seconds, "total": round(time.perf_counter() - self.since, 4)},
            peak_memory_bytes=peak_bytes("cuda" if _uses_gpu() else "cpu"),
            results=dict(self.results),
            artefacts=dict(self.artefacts),
        )


def check_out(out: Path, overwrite: bool) -> Path:
    """The absolute path of a run directory that may be written; asked before hours of work, not after.

    Raises:
        InputError: it exists and is not empty (and `overwrite` was not asked for), it is not a run
            directory, or it is the current directory or contains it.
    """
    target = out.absolute()
    here = Path.cwd()
    if target.resolve() == here or target.resolve() in here.parents:
        raise InputError(
            f"--out {out}: is the current directory or one around it; name a directory of its own"
        )
    if not target.exists():
        return target
    if not target.is_dir():
        raise InputError(f"--out {out}: exists and is not a directory")
    if any(target.iterdir()):
        if not overwrite:
            raise InputError(
                f"--out {out}: exists and is not empty; name another directory or give --overwrite"
            )
        if not (target / RECORD).is_file():
            raise InputError(
                f"--out {out}: holds no {RECORD}, so it is no run directory and is not overwritten"
            )
    return target


def versions() -> dict[str, str | None]:
    """Of unpoison and of what decides its numbers."""

    def version(distribution: str) -> str | None:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            return None

    return {
        "unpoison": version("unpoison"),
        "torch": str(sys.modules["torch"].__version__) if "torch" in sys.modules else version("torch"),
        "python": platform.python_version(),
        "numpy": version("numpy"),
    }


def device_facts() -> dict[str, Any]:
    """The machine that the run ran on. The GPU is named when the run has used it."""
    facts = {
        "type": "cpu",
        "name": _processor_name(),
        "threads": os.cpu_count() or 1,
        "platform": platform.platform(),
    }
    if "torch" in sys.modules:
        import torch

        facts["threads"] = torch.get_num_threads()
        if _uses_gpu():
            facts.update(type="cuda", name=torch.cuda.get_device_name())
    return facts


def _uses_gpu() -> bool:
    if "torch" not in sys.modules:
        return False
    import torch

    return bool(torch.cuda.is_available() and torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _processor_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
