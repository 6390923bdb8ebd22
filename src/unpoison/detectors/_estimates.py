"""What a search will take, estimated before it starts; refused with what would fit.

A detector says by `Detector.memory_needed` what takes how much, from what `Measured` knows of the network and
of the training set.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, cast, final

import torch
from torch import nn

from unpoison._memory import check_memory
from unpoison.data import Examples
from unpoison.detectors._representations import Reader
from unpoison.errors import InputError
from unpoison.influence import Parts, influence_bytes, tracked_layers
from unpoison.models import Activations, activations_of, device_of

if TYPE_CHECKING:
    from unpoison.detectors._detector import Detector

_FEW: Final = 2
_SMALL_BATCH: Final = 8


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Measured:
    """What memory depends on.

    Arguments:
        model: the network.
        training_set: what is searched.
        observed: how many inputs are traced.
        examples: how many training examples there are.
        largest_class: how many of them the largest class has.
        activations: of the network.
    """

    model: nn.Module
    training_set: Examples
    observed: int
    examples: int
    largest_class: int
    activations: Activations

    @classmethod
    def of(cls, model: nn.Module, training_set: Examples, observed: int) -> Measured:
        """Measure by a forward pass of two examples."""
        counts = torch.bincount(training_set.labels.cpu(), minlength=1)
        return cls(
            model=model,
            training_set=training_set,
            observed=observed,
            examples=len(training_set),
            largest_class=int(counts.max()),
            # `batch` would start the processes that read the whole set ahead.
            activations=activations_of(model, training_set.at(range(min(_FEW, len(training_set))))[0]),
        )

    def subset(self, examples: int) -> Measured:
        """The same with fewer examples, alike in all classes."""
        share = examples / self.examples
        return replace(self, examples=examples, largest_class=math.ceil(self.largest_class * share))

    @property
    def numbers(self) -> int:
        """How many numbers an input has."""
        shape = self.training_set.input_shape
        return sum(map(math.prod, shape.values() if isinstance(shape, Mapping) else [shape]))

    def influence(
        self, detector: Any, *, queries: int, asked: int, examples: int | None = None, in_blocks: bool = True
    ) -> Parts:
        """Bytes of a detector by influence; see `influence_bytes`."""
        return influence_bytes(
            self.model,
            self.activations,
            modules=detector.modules,
            batch_size=min(detector.batch_size, self.examples),
            queries=queries,
            asked=asked,
            examples=self.examples if examples is None else examples,
            in_blocks=in_blocks,
        )

    def width(self, module: str | None) -> int:
        """How many features the module has; see `Reader`."""
        reader = Reader(self.model, self.training_set.subset([0]), module=module, batch_size=1)
        return reader.all().shape[1]

    def by_class(self, detector: Any) -> Parts:
        """Bytes of a detector that reads features class by class, and takes principal components of them."""
        rows, width = self.largest_class, self._width(detector.module)
        return {
            **self.features(detector, rows),
            "principal components": 8 * (2 * rows * width + 3 * min(width, rows) ** 2),
        }

    def distances(self, detector: Any, rows: int) -> Parts:
        """Bytes of a block of distances among so many examples, and of a copy."""
        return {"distances": 2 * min(detector.block_bytes, 4 * rows**2)}

    def features(self, detector: Any, rows: int) -> Parts:
        """Bytes of the features of so many examples, batch by batch and then joined."""
        width, batch = self._width(detector.module), min(detector.batch_size, self.examples)
        return {
            "features": 4 * width * (2 * rows + batch),
            "activations": self.activations.reading(batch),
        }

    @cached_property
    def _widths(self) -> dict[str | None, int]:
        return {}

    def _width(self, module: str | None) -> int:
        if module not in self._widths:
            self._widths[module] = self.width(module)
        return self._widths[module]


def check_search(
    verb: str, detector: Detector, model: nn.Module, training_set: Examples, *, observed: int
) -> None:
    """Refuse a search that takes more memory than may be taken.

    Raises:
        InsufficientMemoryError: in one line, with what would fit.
    """
    measured = Measured.of(model, training_set, observed)
    needed = detector.memory_needed(measured)
    check_memory(
        verb, needed, advice=lambda allowed: _what_fits(detector, measured, allowed), device=device_of(model)
    )


def _what_fits(detector: Detector, measured: Measured, allowed: int) -> str:
    """The settings that take no more than is allowed: a single one, else one beside a small batch."""
    declared = {one.name for one in fields(cast("Any", detector))}
    for first in ({}, {"batch_size": _SMALL_BATCH}) if "batch_size" in declared else ({},):
        for changed, examples, words in _smaller(detector, measured):
            try:
                one: Detector = replace(cast("Any", detector), **first, **changed)
            except (InputError, TypeError):  # against another option, or batch_size twice
                continue
            if sum(one.memory_needed(measured.subset(examples)).values()) <= allowed:
                small = f"batch_size={_SMALL_BATCH} and " if first else ""
                return f"{small}{words} would fit"
    return "no setting makes it fit; free memory, or use a machine with more"


def _smaller(detector: Detector, measured: Measured) -> Iterator[tuple[dict[str, Any], int, str]]:
    """Smaller and smaller values of each option, or subsets: what is changed, the examples, and words."""
    declared = {one.name: getattr(detector, one.name) for one in fields(cast("Any", detector))}
    for name in ("batch_size", "draws", "dimensions", "block_bytes"):
        if isinstance(declared.get(name), int):
            for value in _halved(declared[name]):
                yield {name: value}, measured.examples, f"{name}={value}"
    if "modules" in declared:
        names = [one.name for one in tracked_layers(measured.model, declared["modules"])]
        for count in _halved(len(names)):
            last = tuple(names[-count:])
            more = f"the last {count} of {len(names)} modules, from {last[0]!r} on, by modules="
            yield {"modules": last}, measured.examples, f"modules={list(last)}" if count <= 3 else more
    else:
        for count in _halved(measured.examples):
            yield {}, count, f"a subset of {count:,} examples"


def _halved(value: int) -> Iterator[int]:
    while value > 1:
        value //= 2
        yield value
