"""The examples that a stage works on, and the goal of an attack on them."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self, final

import torch
from torch import Tensor

from unpoison import data
from unpoison.data import TrainingSet
from unpoison.errors import InputError, MismatchError
from unpoison.threats import Goal, make_goal

Values = Mapping[str, Any]
Rows = tuple[int, int] | None


@final
@dataclass(frozen=True, eq=False)
class StageData:
    """The data of an experiment, as one stage sees it.

    Arguments:
        whole: the training set that the recipe names.
        held_out: the test set that the recipe names, before any rows are chosen.
        test_rows: [first, end) of it to measure on.
        reference_rows: [first, end) of it that detectors may use as a reference.
        all_groups: the group of every example of `whole`, where the recipe says how they are named.
        chosen: Int64[n], the examples of `whole` that are trained on; None for all.
    """

    whole: TrainingSet
    held_out: TrainingSet | None
    test_rows: Rows
    reference_rows: Rows
    all_groups: tuple[str, ...] | None = None
    chosen: Tensor | None = None

    @classmethod
    def of(cls, configuration: Values, surroundings: Values) -> Self:
        """The data of a stage, checked to be what was planned for."""
        torch.set_num_threads(surroundings["threads"])
        found = cls.read(surroundings, surroundings["device"])
        if found.whole.fingerprint != configuration["data"]:
            raise MismatchError(
                f"{surroundings['source']}: the training set has changed since the sweep was planned"
            )
        return found.subset(configuration.get("per_class"), configuration.get("bases", ()))

    @classmethod
    def read(cls, places: Values, device: str = "cpu") -> Self:
        """The sets that `source` and `test` name; of the first its `rows`."""
        source, rows, pattern = places["source"], places["rows"], places.get("groups")
        whole, held_out = _loaded(source, places["test"], rows, device)
        named = None if pattern is None else _groups(source, pattern, rows)
        return cls(whole, held_out, places["test_rows"], places["reference_rows"], named)

    def subset(self, per_class: int | None, bases: Sequence[int]) -> Self:
        """The same, with the first examples of each class and the base images at the end.

        Arguments:
            per_class: how many examples of each class, the base images included; None for the whole set.
            bases: places in the whole set of the images that an attack may change.
        """
        if per_class is None:
            return self
        labels = self.whole.labels.cpu()
        last = torch.tensor(bases, dtype=torch.int64)
        free = torch.ones(len(labels), dtype=torch.bool)
        free[last] = False
        parts = []
        for label in range(self.whole.num_classes):
            wanted = per_class - int((labels[last] == label).sum())
            found = ((labels == label) & free).nonzero().squeeze(1)
            if len(found) < wanted:
                raise InputError(
                    f"per_class: {self.whole.name} has {len(found)} examples of class "
                    f"{self.whole.class_names[label]!r}, not {wanted}"
                )
            parts.append(found[:wanted])
        return replace(self, chosen=torch.cat([*parts, last]))

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.whole.device

    @cached_property
    def training_set(self) -> TrainingSet:
        """The clean set that victims are trained on."""
        return self.whole if self.chosen is None else self.whole.subset(self.chosen.to(self.device))

    @property
    def groups(self) -> tuple[str, ...] | None:
        """The groups of near-duplicates of the training set; None where they are not known."""
        if self.all_groups is None or self.chosen is None:
            return self.all_groups
        return tuple(self.all_groups[place] for place in self.chosen.tolist())

    @cached_property
    def test(self) -> TrainingSet:
        """The set that is measured on."""
        if self.held_out is None:
            raise InputError(f"{self.whole.name}: has no test set to measure on; give data.test")
        return _cut(self.held_out, self.test_rows, "test_rows")

    @cached_property
    def reference(self) -> TrainingSet | None:
        """What detectors may use as a reference; None where the recipe names no rows."""
        if self.reference_rows is None or self.held_out is None:
            return None
        return _cut(self.held_out, self.reference_rows, "reference_rows")


@functools.lru_cache(maxsize=2)
def _loaded(source: str, test: str | None, rows: Rows, device: str) -> tuple[TrainingSet, TrainingSet | None]:
    splits = data.load(source, test=test).to(device)
    return _cut(splits.train, rows, "rows"), splits.test


@functools.lru_cache(maxsize=2)
def _groups(source: str, pattern: str, rows: Rows) -> tuple[str, ...]:
    first, end = rows or (None, None)
    paths = data.image_paths(source)[first:end]
    found = [re.search(pattern, path) for path in paths]
    for path, match in zip(paths, found, strict=True):
        if match is None:
            raise InputError(f"groups: {pattern!r} does not match the path {path!r} of an image")
    return tuple(match.group() for match in found if match is not None)


def _cut(examples: TrainingSet, rows: Rows, key: str) -> TrainingSet:
    if rows is None:
        return examples
    if rows[1] > len(examples):
        raise InputError(f"{key}: {examples.name} has {len(examples)} examples, not {rows[1]}")
    return examples.subset(torch.arange(rows[0], rows[1], device=examples.device))


def goal_of(described: Values, test: TrainingSet, trigger: str | None = None) -> Goal:
    """The goal of an attack, of plain values.

    Arguments:
        described: its kind, and the classes and places in the test set that this kind needs.
        test: where target images are taken from.
        trigger: the file of the trigger, where `described` holds only a digest of its picture.
    """
    given = {**described, "trigger": trigger or described.get("trigger")}
    kind = given.pop("kind")
    return make_goal(
        (kind,),
        kind,
        class_names=test.class_names,
        test_set=test,
        options={"test_indices": "targets.images", "trigger": "attacks.trigger"},
        **given,
    )
