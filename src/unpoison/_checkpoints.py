"""Checkpoints of long work: the state after each step, as safetensors and JSON.

A checkpoint is a directory `epoch-0003` (three epochs done) that is renamed into place; the one before it is
removed afterwards, so a process killed at any moment leaves a whole one. It holds no random state: generators
are derived from the seed and the number of the step.

A checkpoint of other work is a `MismatchError`, one that cannot be read an `InputError`: it is never silently
replaced, since hours of work may depend on it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unpoison._artefacts import atomic_directory, digest, read_json, write_json
from unpoison.errors import InputError, MismatchError

_STATE = "state.safetensors"


@final
@dataclass(frozen=True, kw_only=True)
class Kind:
    """The names in checkpoints of one kind of work.

    Arguments:
        work: in messages, "run" or "craft".
        unit: of progress; begins the names of the directories.
        file: the JSON file in each.
        notes: the key of its notes.
    """

    work: str
    unit: str
    file: str
    notes: str


TRAINING = Kind(work="run", unit="epoch", file="checkpoint.json", notes="history")
CRAFTING = Kind(work="craft", unit="step", file="crafting.json", notes="notes")


@final
@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One stored state.

    Arguments:
        done: how many epochs or steps are behind it.
        tensors: by name.
        notes: everything else, ready for JSON.
    """

    done: int
    tensors: Mapping[str, Tensor]
    notes: Any

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix`, by the rest of their names."""
        start = len(prefix)
        return {name[start:]: tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """A digest of tensors: their names, types, shapes and contents."""
    parts: list[str | bytes] = []
    for name, tensor in tensors.items():
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        parts += [f"{name} {tensor.dtype} {tuple(tensor.shape)}", content]
    return digest(*parts)


@final
class Checkpoints:
    """The checkpoints of one run in one directory.

    Arguments:
        directory: created with the first checkpoint.
        identity: everything that decides the result (plain values); a checkpoint with another identity is
            refused.
        kind: `TRAINING` or `CRAFTING`.

    Raises:
        InputError: the directory is a file, or holds something else.
    """

    def __init__(self, directory: str | os.PathLike[str], identity: Mapping[str, Any], *, kind: Kind) -> None:
        self.directory = Path(directory)
        self.identity = dict(identity)
        self.kind = kind
        if self.directory.exists() and not self.directory.is_dir():
            raise InputError(f"{self.directory}: is a file; name a directory for checkpoints")
        if not self._found() and any(not path.name.startswith(".") for path in self._entries()):
            raise InputError(
                f"{self.directory}: holds other things than checkpoints of a {kind.work}; name an empty "
                "directory, or a new one"
            )

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint, or None where there is none.

        Raises:
            MismatchError: it belongs to other work; the message names what differs.
            InputError: it cannot be read.
        """
        found = self._found()
        if not found:
            return None
        done, path = max(found)
        try:
            description = read_json(path / self.kind.file)
            identity, notes = description["identity"], description[self.kind.notes]
            tensors = load_file(path / _STATE)
        except (InputError, OSError, SafetensorError, KeyError) as error:
            raise InputError(
                f"{path}: damaged checkpoint ({error}); remove {self.directory} to start anew"
            ) from None
        differing = sorted(
            key for key in {*identity, *self.identity} if identity.get(key) != self.identity.get(key)
        )
        if differing:
            raise MismatchError(
                f"{path}: this checkpoint belongs to a {self.kind.work} with another "
                f"{', another '.join(differing)}; name another directory or remove it"
            )
        return Checkpoint(done=done, tensors=tensors, notes=notes)

    def write(self, checkpoint: Checkpoint) -> None:
        """Store `checkpoint`, then remove the older ones."""
        older = [path for done, path in self._found() if done < checkpoint.done]
        with atomic_directory(self.directory / f"{self.kind.unit}-{checkpoint.done:04d}") as staging:
            tensors = {
                name: tensor.detach().cpu().contiguous().clone()
                for name, tensor in checkpoint.tensors.items()
            }
            save_file(tensors, staging / _STATE)
            write_json(
                staging / self.kind.file, {"identity": self.identity, self.kind.notes: checkpoint.notes}
            )
        # Left by processes that were killed: `.epoch-0003.1a2b3c4d.partial`.
        for path in (*older, *self.directory.glob(f".{self.kind.unit}-*.partial")):
            shutil.rmtree(path, ignore_errors=True)

    def _found(self) -> list[tuple[int, Path]]:
        name = re.compile(rf"{self.kind.unit}-(\d+)")
        matches = ((name.fullmatch(path.name), path) for path in self._entries())
        return [(int(match[1]), path) for match, path in matches if match]

    def _entries(self) -> list[Path]:
        return list(self.directory.iterdir()) if self.directory.is_dir() else []
