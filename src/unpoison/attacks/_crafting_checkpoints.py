"""Checkpoints of a long craft: after each step all its tensors and its history, as safetensors and JSON.

A checkpoint is a directory `step-0007` (seven steps done) that appears in one piece; the one before it is
removed afterwards, so that a process killed at any moment leaves a whole one.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unpoison._artefacts import atomic_directory, read_json, write_json
from unpoison.errors import InputError, MismatchError

_NAME = re.compile(r"step-(\d+)")


@final
@dataclass(frozen=True, kw_only=True)
class CraftingCheckpoint:
    """One stored state.

    Arguments:
        steps_done: how many craft steps are behind it.
        tensors: by name.
        notes: everything else, ready for JSON.
    """

    steps_done: int
    tensors: Mapping[str, Tensor]
    notes: Mapping[str, Any]


@final
class CraftingCheckpoints:
    """The checkpoints of one craft in one directory.

    Arguments:
        directory: made when the first checkpoint is written.
        identity: what is crafted (plain values); a checkpoint of anything else is refused.
    """

    def __init__(self, directory: str | os.PathLike[str], identity: Mapping[str, Any]) -> None:
        self.directory = Path(directory)
        self.identity = dict(identity)

    def latest(self) -> CraftingCheckpoint | None:
        """The newest checkpoint, or None where there is none.

        Raises:
            MismatchError: it belongs to another craft; the message names what differs.
            InputError: it cannot be read.
        """
        found = self._found()
        if not found:
            return None
        steps_done, path = max(found)
        try:
            description = read_json(path / "crafting.json")
            identity, notes = description["identity"], description["notes"]
            tensors = load_file(path / "state.safetensors")
        except (InputError, OSError, SafetensorError, KeyError) as error:
            raise InputError(
                f"{path}: damaged checkpoint ({error}); remove {self.directory} to start anew"
            ) from None
        differing = sorted(
            key for key in {*identity, *self.identity} if identity.get(key) != self.identity.get(key)
        )
        if differing:
            raise MismatchError(
                f"{path}: this checkpoint belongs to a craft with another {', another '.join(differing)}; "
                "name another directory or remove it"
            )
        return CraftingCheckpoint(steps_done=steps_done, tensors=tensors, notes=notes)

    def write(self, checkpoint: CraftingCheckpoint) -> None:
        """Store `checkpoint`, then remove the older ones."""
        older = [path for steps, path in self._found() if steps < checkpoint.steps_done]
        with atomic_directory(self.directory / f"step-{checkpoint.steps_done:04d}") as staging:
            tensors = {
                name: tensor.detach().cpu().contiguous().clone()
                for name, tensor in checkpoint.tensors.items()
            }
            save_file(tensors, staging / "state.safetensors")
            write_json(
                staging / "crafting.json", {"identity": self.identity, "notes": dict(checkpoint.notes)}
            )
        for path in (*older, *self.directory.glob(".step-*.partial")):
            shutil.rmtree(path, ignore_errors=True)

    def _found(self) -> list[tuple[int, Path]]:
        if not self.directory.is_dir():
            return []
        matches = ((_NAME.fullmatch(path.name), path) for path in self.directory.iterdir())
        return [(int(match[1]), path) for match, path in matches if match]
