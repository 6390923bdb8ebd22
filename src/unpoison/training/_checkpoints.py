"""Checkpoints: after each epoch, everything the next one needs, as safetensors and JSON.

A checkpoint is a directory `epoch-0003` (three epochs done) that appears in one step; the one before it is
removed afterwards, so a process killed at any moment leaves a whole one. Random numbers need no place in it:
every epoch derives its generators from the seed and its own number.

A checkpoint that belongs to another run is a `MismatchError`, and one that cannot be read an `InputError`:
directories appear whole, so damage means a failing disk or a foreign hand, and hours of training are not
thrown away in silence.
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

_STATE, _DESCRIPTION = "state.safetensors", "checkpoint.json"
_NAME = re.compile(r"epoch-(\d+)")


@final
@dataclass(frozen=True)
class Checkpoint:
    """One stored state.

    Arguments:
        epochs_done: how many epochs are behind it.
        tensors: by name.
        history: the records of those epochs, as plain values.
    """

    epochs_done: int
    tensors: Mapping[str, Tensor]
    history: list[dict[str, Any]]


@final
class Checkpoints:
    """The checkpoints of one run in one directory.

    Arguments:
        directory: made when the first checkpoint is written.
        identity: what the run is (plain values); a checkpoint with another identity is refused.
    """

    def __init__(self, directory: str | os.PathLike[str], identity: Mapping[str, Any]) -> None:
        self.directory = Path(directory)
        self.identity = dict(identity)

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint, or None where there is none.

        Raises:
            MismatchError: it belongs to another run; the message names what differs.
            InputError: it cannot be read.
        """
        found = self._found()
        if not found:
            return None
        epochs_done, path = max(found)
        try:
            description = read_json(path / _DESCRIPTION)
            identity, history = description["identity"], description["history"]
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
                f"{path}: this checkpoint belongs to a run with another {', another '.join(differing)}; "
                "name another directory or remove it"
            )
        return Checkpoint(epochs_done, tensors, history)

    def write(self, checkpoint: Checkpoint) -> None:
        """Store `checkpoint`, then remove the older ones."""
        older = [path for epochs, path in self._found() if epochs < checkpoint.epochs_done]
        with atomic_directory(self.directory / f"epoch-{checkpoint.epochs_done:04d}") as staging:
            save_file(
                {
                    name: tensor.detach().cpu().contiguous().clone()
                    for name, tensor in checkpoint.tensors.items()
                },
                staging / _STATE,
            )
            write_json(staging / _DESCRIPTION, {"identity": self.identity, "history": checkpoint.history})
        # Only what writers that were killed left behind: `.epoch-0003.1a2b3c4d.partial`.
        for path in (*older, *self.directory.glob(".epoch-*.partial")):
            shutil.rmtree(path, ignore_errors=True)

    def _found(self) -> list[tuple[int, Path]]:
        if not self.directory.is_dir():
            return []
        matches = ((_NAME.fullmatch(path.name), path) for path in self.directory.iterdir())
        return [(int(match[1]), path) for match, path in matches if match]
