"""The files of an `InfluenceIndex`: shards that are made one by one, checked, and made again when damaged.

    index.json           what the index is of: fingerprints, settings, the parts that it was made from
    factors/             EK-FAC factors
    basis.safetensors    Float32[D m], see `_index`
    examples-0.json      the ids and class names of the first part
    shards/0.safetensors the rows of the examples 0, 1, ...; named by the first

Every file is written beside its place and renamed, so that a killed process leaves whole files alone. A shard
bears the digest of its content and that of the basis that it was made with; one whose content is another is
damaged. Shards are memory maps: reading some rows reads those pages.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unpoison._artefacts import alone, atomic_file, canonical_json, read_json, write_json
from unpoison.data import Examples, TrainingSet
from unpoison.errors import InputError
from unpoison.influence._factors import Factors, sampled_fingerprint

FORMAT: Final = 3
RECORD: Final = "index.json"


@final
@dataclass(frozen=True)
class Span:
    """The examples `start` to `stop` of a part that begins at `first`."""

    start: int
    stop: int
    first: int


@final
@dataclass(frozen=True)
class IndexFiles:
    """The files of the index in a directory."""

    directory: Path

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Lock the directory while something is made in it.

        Raises:
            InputError: another process makes it, or it cannot be written to.
        """
        said = f"{self.directory}: another process is making this index; wait for it, or end it"
        with writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        with alone(self.directory, said):
            yield

    def exists(self) -> bool:
        """Whether an index, perhaps an unfinished one, lies here."""
        return (self.directory / RECORD).is_file()

    def record(self) -> dict[str, Any]:
        """What the index is of.

        Raises:
            InputError: there is none, or it has another format.
        """
        if not self.exists():
            raise InputError(f"{self.directory}: no index of influences; make one with unpoison index")
        record = read_json(self.directory / RECORD)
        if record.get("format") != FORMAT:
            known = record.get("format")
            raise InputError(
                f"{self.directory}: an index of format {known!r}, expected {FORMAT}; make it anew"
            )
        return record

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Keep what the index is of."""
        with writing(self.directory / RECORD):
            write_json(self.directory / RECORD, {"format": FORMAT, **record})

    def write_names(self, part: int, ids: Sequence[str] | None, class_names: Sequence[str]) -> None:
        """Keep what people call the examples of a part."""
        names = {"ids": None if ids is None else list(ids), "class_names": list(class_names)}
        with writing(self.directory / f"examples-{part}.json"):
            write_json(self.directory / f"examples-{part}.json", names)

    def names(self, part: int) -> dict[str, Any]:
        """The `ids` and `class_names` of a part."""
        return read_json(self.directory / f"examples-{part}.json")

    def write_factors(self, factors: Factors) -> None:
        """Keep the factors."""
        with writing(self.factors):
            factors.save(self.factors)

    @property
    def factors(self) -> Path:
        """Where the factors are."""
        return self.directory / "factors"

    @property
    def basis(self) -> Path:
        """Where the basis is."""
        return self.directory / "basis.safetensors"

    def shard(self, span: Span) -> Path:
        """Where a shard is."""
        return self.directory / "shards" / f"{span.start}.safetensors"

    def missing(self, record: Mapping[str, Any]) -> tuple[list[Span], list[Span]]:
        """All shards of a record, and those that are not there."""
        every = list(spans(record["parts"], record["shard_examples"]))
        return every, [one for one in every if not self.shard(one).is_file()]

    def write_shard(self, span: Span, tensors: Mapping[str, Tensor], basis: str) -> None:
        """Keep the rows of a span, which were made with the basis of this digest."""
        write_tensors(self.shard(span), tensors, made_of=basis)

    def is_sound(self, span: Span, basis: str) -> bool:
        """Whether a shard is there, undamaged, and made with this basis."""
        try:
            tensors, made_of, _ = read_tensors(self.shard(span))
        except InputError:
            return False
        return made_of == basis and len(tensors["labels"]) == span.stop - span.start


def spans(parts: Sequence[Mapping[str, Any]], size: int) -> Iterator[Span]:
    """The shards of parts with so many `examples` each; a shard lies in one part.

    >>> [(one.start, one.stop) for one in spans([{"examples": 5}, {"examples": 2}], 3)]
    [(0, 3), (3, 5), (5, 7)]
    """
    first = 0
    for part in parts:
        last = first + int(part["examples"])
        for start in range(first, last, size):
            yield Span(start, min(start + size, last), first)
        first = last


def part_of(examples: Examples) -> dict[str, Any]:
    """What a record keeps of the examples of a part.

    The content of all of them is known of those in memory alone; the rest is the same for examples that are
    read piece by piece.
    """
    return {
        "examples": len(examples),
        "fingerprint": sampled_fingerprint(examples),
        "content": examples.fingerprint if isinstance(examples, TrainingSet) else None,
    }


def same_part(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two parts are of the same examples, as far as both know them."""
    if None in (one["content"], other["content"]):
        return all(one[name] == other[name] for name in ("examples", "fingerprint"))
    return one == other


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, made_of: str = "") -> str:
    """Write tensors with the digest of their content, which is returned."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    known = content_digest(ready)
    metadata = {"record": canonical_json({"digest": known, "made_of": made_of})}
    with writing(path), atomic_file(path) as staging:
        save_file(ready, staging, metadata=metadata)
    return known


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the failure to write a file within the block into an error of one line.

    Raises:
        InputError: the disk is full, for instance.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(
            f"{path}: cannot be written ({said}); what is there is whole, and the same command goes on"
        ) from None


def read_tensors(path: Path, *names: str, check: bool = True) -> tuple[dict[str, Tensor], str, str]:
    """Memory maps of tensors that `write_tensors` wrote, what they were made of, and their digest.

    Of all tensors, unless `names` are given, which are not checked.

    Raises:
        InputError: the file is not there or, where this is checked, its content is another.
    """
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {})["record"])
            tensors = {name: file.get_tensor(name) for name in names or file.keys()}
            known, made_of = str(record["digest"]), str(record["made_of"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); unpoison index makes it anew") from None
    if check and not names and content_digest(tensors) != known:
        raise InputError(f"{path}: damaged; unpoison index makes it anew")
    return tensors, made_of, known


def content_digest(tensors: Mapping[str, Tensor]) -> str:
    """A digest of the names, types, shapes and values of tensors on the CPU.

    SHA-256, which processors have instructions for: shards are large.
    """
    state = hashlib.sha256(usedforsecurity=False)
    for name in sorted(tensors):
        one = tensors[name]
        state.update(canonical_json([name, str(one.dtype), list(one.shape)]).encode())
        flat = one.contiguous().view(-1).view(torch.uint8).numpy()
        state.update(np.ascontiguousarray(flat).data if flat.size else b"")
    return state.hexdigest()[:32]


def factors_digest(factors: Factors) -> str:
    """A digest of the values of factors."""
    tensors = {}
    for name, layer in factors.layers.items():
        tensors[f"{name}/eigenvalues"] = layer.eigenvalues.cpu()
        if layer.input_basis is not None and layer.output_basis is not None:
            tensors[f"{name}/input_basis"] = layer.input_basis.cpu()
            tensors[f"{name}/output_basis"] = layer.output_basis.cpu()
    return content_digest(tensors)
