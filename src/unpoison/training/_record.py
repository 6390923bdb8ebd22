"""`TrainingRecord`: which examples a training loop of one's own drew, in which order, from which set."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Sampler

from unpoison._artefacts import atomic_directory, read_record, write_json
from unpoison.data import Examples
from unpoison.errors import InputError, MismatchError

_FORMAT: Final = 1


@final
class RecordingSampler(Sampler[int]):
    """Another sampler, with what it draws taken down, and without the examples that are not kept.

    Arguments:
        sampler: gives indices of examples.

    `keep` is Bool[n], or None for all; it takes effect at once. `epochs` holds what was drawn, a list of
    indices for each pass. A loader may draw a few batches more than it trains on before it is stopped.
    """

    def __init__(self, sampler: Iterable[int]) -> None:
        self.sampler = sampler
        self.keep: Tensor | None = None
        self.epochs: list[list[int]] = []

    def __len__(self) -> int:
        size: Any = self.sampler
        return len(size) if self.keep is None else min(len(size), int(self.keep.sum()))

    def __iter__(self) -> Iterator[int]:
        drawn: list[int] = []
        self.epochs.append(drawn)
        for index in self.sampler:
            if self.keep is None or bool(self.keep[int(index)]):
                drawn.append(int(index))
                yield index

    def set_epoch(self, epoch: int) -> None:
        """Tell the sampler, if it wants to know."""
        told = getattr(self.sampler, "set_epoch", None)
        if told is not None:
            told(epoch)


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class TrainingRecord:
    """What a training run drew from its set.

    Arguments:
        fingerprint: of the examples; `check` compares it with that of a set.
        order: Int64[k] for each epoch, the indices of the examples in the order in which they were drawn.
        dropped: Bool[n], the examples that a defense has dropped.
        defense: which, with its settings; None without one.
        checkpoints: pairs of an optimizer step and the place of the checkpoint that was written after it.
        state: of the defense, to resume with.
    """

    fingerprint: str
    order: tuple[Tensor, ...]
    dropped: Tensor
    defense: str | None = None
    checkpoints: tuple[tuple[int, str], ...] = ()
    state: Mapping[str, Tensor] = field(default_factory=dict)

    def check(self, examples: Examples) -> None:
        """That these are the examples that were trained on, in their order.

        Raises:
            MismatchError: they are not.
        """
        if examples.fingerprint != self.fingerprint:
            raise MismatchError(
                f"{examples.name}: is not the training set of the record; give the very set that was trained "
                "on, in the same order"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the record as a directory, in one step."""
        tensors = {f"order.{number}": drawn for number, drawn in enumerate(self.order)}
        tensors |= {f"state.{name}": one.contiguous() for name, one in self.state.items()}
        with atomic_directory(path) as staging:
            save_file({**tensors, "dropped": self.dropped}, staging / "training.safetensors")
            write_json(
                staging / "training.json",
                {
                    "format": _FORMAT,
                    "fingerprint": self.fingerprint,
                    "defense": self.defense,
                    "checkpoints": [list(one) for one in self.checkpoints],
                    "epochs": len(self.order),
                },
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TrainingRecord:
        """Read a record that `save` wrote.

        Raises:
            InputError: there is none, or it is damaged.
        """
        folder = Path(path)
        record = read_record(folder / "training.json", _FORMAT, "training records")
        try:
            tensors = load_file(folder / "training.safetensors")
            return cls(
                fingerprint=record["fingerprint"],
                order=tuple(tensors[f"order.{number}"] for number in range(record["epochs"])),
                dropped=tensors["dropped"],
                defense=record["defense"],
                checkpoints=tuple((step, place) for step, place in record["checkpoints"]),
                state={
                    name.removeprefix("state."): one
                    for name, one in tensors.items()
                    if name.startswith("state.")
                },
            )
        except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{folder}: damaged training record ({type(error).__name__})") from None
