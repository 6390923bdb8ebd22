"""Where work is kept, and what of the case a job is told of."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from unpoison.report import plain
from unpoison.runs import RECORD


def kept(out: Path, verb: str) -> list[Path]:
    """The run directories of earlier jobs, in their order."""
    found = [one for one in out.glob(f"{verb}-*") if (one / RECORD).is_file()]
    return sorted(found, key=lambda one: (len(one.name), one.name))


def free(out: Path, what: str, suffix: str, taken: Iterable[Path]) -> Path:
    """The next numbered place in a directory.

    Arguments:
        out: the directory.
        what: the name before the number.
        suffix: after it.
        taken: places that are used besides those that are there.
    """
    stem = Path(what).name
    tails = [
        one.stem.rpartition("-")[2] for one in (*out.glob(f"*{what}-*"), *taken) if f"{stem}-" in one.stem
    ]
    last = max((int(tail) for tail in tails if tail.isdigit()), default=0)
    return out / f"{what}-{last + 1}{suffix}"


def hashed_files(options: tuple[str, ...]) -> list[str]:
    """The options of export that name the files of data and model, to be hashed; where there are such."""
    given = dict(pairwise(options))
    found = [("--files", given.get("--data"))]
    if (model := given.get("--model")) is not None and (Path(model) / "model/model.safetensors").is_file():
        found.append(("--model", model))
    return [word for name, place in found if place and Path(place).exists() for word in (name, place)]


def short(suspect: str) -> str:
    """What people call a suspect: the name of a file without its folders."""
    return plain(Path(suspect).name, limit=60)
