"""`PoisonSet`: what every attack returns; stored as tensors, a table for people, and JSON.

A stored poison set is a directory:

- `poison.safetensors`: indices, images, labels and changes, and the goal's own tensors under `goal.`;
- `examples.parquet`: one row for each poisoned example (index, clean_label, given_label, linf, l2), for any
  table tool; it repeats part of the first file and is not read back;
- `poison.json`: the goal, the attack with its configuration and seed, the fingerprint of the training set
  that the poison belongs to, and a digest over all of it and over the first file, by which damage is
  detected.

Images are the 8-bit ones that a victim is given, so measurements are the same before saving and after
loading.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from unpoison._artefacts import atomic_directory, canonical_json, digest, read_json, write_json
from unpoison.data import TrainingSet
from unpoison.errors import InputError, MismatchError
from unpoison.threats._goal import Goal
from unpoison.threats._tagged import prefixed, under

_SCHEMA = 1
_TENSORS = ("indices", "images", "clean_labels", "given_labels", "linf", "l2")


@final
@dataclass(frozen=True, eq=False)
class PoisonSet:
    """The examples that an attack changed, and everything that is needed to use and to evaluate them.

    Attacks build one with `PoisonSet.of`, which measures the changes itself. All tensors are on the CPU.

    Arguments:
        indices: Int64[k], ascending places in the clean training set, each once.
        images: UInt8[k c h w], the poisoned images.
        clean_labels: Int64[k], the labels before.
        given_labels: Int64[k], the labels of the poisons; equal to the clean ones in a clean-label attack.
        linf: Float32[k], the largest change of any value of the image, in 1/255.
        l2: Float32[k], the root of the sum of squared changes, in 1/255.
        goal: what the adversary wants.
        attack: the name of the attack.
        configuration: its options, ready for JSON.
        seed: of everything random.
        fingerprint: that of the clean training set these examples belong to.
        name: of that set.

    Raises:
        InputError: shapes or types do not match, an index is negative or named twice, or the configuration
            cannot be written as JSON.
    """

    indices: Tensor = field(repr=False)
    images: Tensor = field(repr=False)
    clean_labels: Tensor = field(repr=False)
    given_labels: Tensor = field(repr=False)
    linf: Tensor = field(repr=False)
    l2: Tensor = field(repr=False)
    goal: Goal
    attack: str
    configuration: Mapping[str, Any]
    seed: int
    fingerprint: str
    name: str

    def __post_init__(self) -> None:
        count = len(self.indices)
        for what, dtype in (
            ("indices", torch.int64),
            ("clean_labels", torch.int64),
            ("given_labels", torch.int64),
            ("linf", torch.float32),
            ("l2", torch.float32),
        ):
            tensor: Tensor = getattr(self, what)
            if tensor.dtype != dtype or tensor.shape != (count,):
                raise InputError(
                    f"PoisonSet: {what} must be {dtype} of shape [{count}], "
                    f"found {tensor.dtype} of shape {tuple(tensor.shape)}"
                )
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or len(self.images) != count:
            raise InputError(
                f"PoisonSet: images must be uint8 of shape [{count}, channels, height, width], "
                f"found {self.images.dtype} of shape {tuple(self.images.shape)}"
            )
        if count and (int(self.indices[0]) < 0 or bool((self.indices.diff() <= 0).any())):
            raise InputError("PoisonSet: indices must be ascending, not negative, and each named once")
        try:
            configuration = json.loads(canonical_json(dict(self.configuration)))
        except (TypeError, ValueError) as error:
            raise InputError(f"PoisonSet: the configuration cannot be written as JSON ({error})") from None
        object.__setattr__(self, "configuration", configuration)

    @classmethod
    def of(
        cls,
        training_set: TrainingSet,
        *,
        indices: Tensor | Sequence[int],
        images: Tensor,
        given_labels: Tensor,
        goal: Goal,
        attack: str,
        configuration: Mapping[str, Any],
        seed: int,
    ) -> PoisonSet:
        """The poison set that replaces the examples at `indices` of the clean set, in any order.

        Raises:
            InputError: an index is outside the set or named twice, a given label is not one of its classes,
                or shapes and types do not match.
        """
        chosen, order = torch.as_tensor(indices, dtype=torch.int64).reshape(-1).cpu().sort()
        clean = training_set.subset(chosen).to("cpu")
        if images.dtype != torch.uint8 or images.shape != clean.images.shape:
            raise InputError(
                f"PoisonSet: {len(chosen)} poisons of {training_set.name} need uint8 images of shape "
                f"{tuple(clean.images.shape)}, found {images.dtype} of shape {tuple(images.shape)}"
            )
        if given_labels.shape != chosen.shape:
            raise InputError(f"PoisonSet: {len(given_labels)} given labels for {len(chosen)} indices")
        labels = given_labels.to("cpu", torch.int64)[order]
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < training_set.num_classes:
            raise InputError(f"PoisonSet: a given label is outside 0..{training_set.num_classes - 1}")
        poisoned = images.cpu()[order].contiguous()
        linf, l2 = _changes(poisoned, clean.images)
        return cls(
            indices=chosen,
            images=poisoned,
            clean_labels=clean.labels,
            given_labels=labels,
            linf=linf,
            l2=l2,
            goal=goal,
            attack=attack,
            configuration=configuration,
            seed=seed,
            fingerprint=training_set.fingerprint,
            name=training_set.name,
        )

    def __len__(self) -> int:
        return len(self.indices)

    def membership(self, n: int) -> Tensor:
        """Bool[n]: which examples of a training set of `n` are poison.

        Raises:
            InputError: the largest index is outside the set.
        """
        if len(self) and int(self.indices[-1]) >= n:
            raise InputError(
                f"PoisonSet: index {int(self.indices[-1])} is outside a training set of {n} examples"
            )
        member = torch.zeros(n, dtype=torch.bool)
        member[self.indices] = True
        return member

    def apply(self, training_set: TrainingSet) -> TrainingSet:
        """The poisoned training set, on the device of the clean one.

        Raises:
            MismatchError: this is not the training set that the poison was crafted for.
        """
        if training_set.fingerprint != self.fingerprint:
            raise MismatchError(
                f"{training_set.name}: the poison was crafted for {self.name!r} with fingerprint "
                f"{self.fingerprint}, this set has {training_set.fingerprint}{self._hint(training_set)}"
            )
        poisoned = training_set.with_examples(self.indices, self.images, self.given_labels)
        return replace(poisoned, name=f"{training_set.name} with {self.attack} poison")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the directory `path`, whole or not at all; an existing one is replaced.

        Raises:
            InputError: `path` is a file.
        """
        import pyarrow
        import pyarrow.parquet
        import safetensors.torch

        tensors = {what: getattr(self, what).contiguous() for what in _TENSORS}
        tensors |= {
            name: tensor.contiguous() for name, tensor in prefixed("goal", self.goal.tensors()).items()
        }
        data = safetensors.torch.save(tensors)
        content: dict[str, Any] = {
            "schema": _SCHEMA,
            "what": "poison set",
            "attack": self.attack,
            "configuration": dict(self.configuration),
            "seed": self.seed,
            "goal": self.goal.to_json(),
            "training_set": {"name": self.name, "fingerprint": self.fingerprint},
            "poisons": len(self),
        }
        content["digest"] = digest(canonical_json(content), data)
        table = pyarrow.table(
            {
                "index": self.indices.numpy(),
                "clean_label": self.clean_labels.numpy(),
                "given_label": self.given_labels.numpy(),
                "linf": self.linf.numpy(),
                "l2": self.l2.numpy(),
            }
        )
        with atomic_directory(path) as staging:
            (staging / "poison.safetensors").write_bytes(data)
            pyarrow.parquet.write_table(table, staging / "examples.parquet")
            write_json(staging / "poison.json", content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PoisonSet:
        """Read what `save` wrote.

        Raises:
            InputError: a file is missing, damaged or edited, or was written by a newer version.
        """
        import safetensors.torch

        from unpoison import threats

        # Importing every kind of goal and trigger registers it, so that the stored one is found.
        for name in dir(threats):
            getattr(threats, name)
        directory = Path(path)
        if not directory.is_dir():
            raise InputError(f"{directory}: no such directory; expected one with a poison set")
        content = read_json(directory / "poison.json")
        if content.get("what") != "poison set" or content.get("schema") != _SCHEMA:
            raise InputError(
                f"{directory / 'poison.json'}: not a poison set of schema {_SCHEMA} "
                f"(found {content.get('what')!r}, schema {content.get('schema')!r})"
            )
        tensor_file = directory / "poison.safetensors"
        try:
            data = tensor_file.read_bytes()
        except FileNotFoundError:
            raise InputError(f"{tensor_file}: no such file; the poison set is incomplete") from None
        except OSError as error:
            raise InputError(f"{tensor_file}: cannot be read ({error})") from None
        expected = content.pop("digest", None)
        try:
            found = digest(canonical_json(content), data)
        except ValueError as error:
            raise InputError(f"{directory / 'poison.json'}: {error}") from None
        if found != expected:
            raise InputError(
                f"{directory}: poison.json and poison.safetensors do not match their digest; one of them was "
                f"damaged or edited, so craft or copy the poison set again"
            )
        try:
            tensors = safetensors.torch.load(data)
            return cls(
                **{what: tensors[what] for what in _TENSORS},
                goal=Goal.from_json(content["goal"], under("goal", tensors)),
                attack=content["attack"],
                configuration=content["configuration"],
                seed=content["seed"],
                fingerprint=content["training_set"]["fingerprint"],
                name=content["training_set"]["name"],
            )
        except InputError as error:
            raise InputError(f"{directory}: {error}") from None
        except (KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
            raise InputError(f"{directory}: not a poison set ({error!r})") from None

    def _hint(self, training_set: TrainingSet) -> str:
        """Why the fingerprint may differ, as the end of a message."""
        if len(self) and len(training_set) > int(self.indices[-1]):
            there = training_set.subset(self.indices).to("cpu")
            if torch.equal(there.images, self.images) and torch.equal(there.labels, self.given_labels):
                return "; the poison is in it already"
        return "; give the set it was crafted for"


def _changes(poisoned: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
    """Float32[k] largest change and Float32[k] Euclidean change of each image, in 1/255."""
    linf, l2 = torch.zeros(len(clean)), torch.zeros(len(clean))
    for start in range(0, len(clean), 1024):
        part = slice(start, start + 1024)
        difference = (poisoned[part].to(torch.int32) - clean[part].to(torch.int32)).flatten(1).abs()
        if difference.shape[1]:
            linf[part] = difference.amax(1).float()
            l2[part] = difference.double().square().sum(1).sqrt().float()
    return linf, l2
