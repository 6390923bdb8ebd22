"""How an `InfluenceIndex` is made: its size, the basis, and what is in a shard."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from unpoison._executors import Executor
from unpoison._memory import allowed_memory, in_words
from unpoison._progress import Progress
from unpoison._seeds import derive_seed, generator
from unpoison.data import Examples
from unpoison.errors import InputError, InsufficientMemoryError, MismatchError
from unpoison.influence._factors import (
    Factors,
    fit_factors,
    model_fingerprint,
    unchanged,
)
from unpoison.influence._index import Gradient
from unpoison.influence._index_files import (
    IndexFiles,
    Span,
    factors_digest,
    part_of,
    read_tensors,
    same_part,
    write_tensors,
)
from unpoison.influence._index_rows import packed, row_bytes
from unpoison.influence._index_space import (
    Space,
    code,
    damping_of,
    damping_record,
    quick_type,
    span_of,
    task_text,
    unit_rows,
)
from unpoison.influence._index_workers import check_executor, make_shards
from unpoison.influence._queries import Damping
from unpoison.influence._sketch import Sketcher
from unpoison.influence._sweep import where
from unpoison.tasks import Task

_NUMBERS: Final = 2048
_SKETCH: Final = 1 << 18
# Bytes of all rows up to which whole gradients are kept in float16, and in int8; bytes of a shard of such
# rows; and of how many parts of what is free on the disk they may take one.
_WHOLE: Final = 1 << 30
_QUANTISED: Final = 8 << 30
_WHOLE_SHARD: Final = 64 << 20
_SHARE: Final = 4
_LEAST: Final = 64
# More does not change the pieces in which a processor reads a batch.
_MEMORY: Final = 4 << 30


@final
@dataclass(frozen=True, kw_only=True)
class Plan:
    """The options of `InfluenceIndex.build`, see there."""

    seed: int
    damping: Damping
    modules: tuple[str, ...] | None
    covariance_examples: int | None
    eigenvalue_examples: int | None
    gradient: Gradient
    numbers: int | None
    sketch: int | None
    processes: int
    shard_examples: int
    batch_size: int
    workspace_bytes: int | None

    def __post_init__(self) -> None:
        for name in ("numbers", "sketch", "processes", "shard_examples", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"index: {name} must be at least 1, found {value}")
        if self.gradient not in ("measurement", "loss"):
            raise InputError(f"index: gradient must be 'measurement' or 'loss', found {self.gradient!r}")


def build(
    files: IndexFiles,
    plan: Plan,
    model: nn.Module,
    examples: Examples,
    task: Task,
    factors: Factors | None,
    executor: Executor | None,
    progress: Progress | None,
) -> None:
    """The stages of `InfluenceIndex.build`."""
    check_executor(executor, model)
    if not len(examples):
        raise InputError(f"{examples.name}: there are no training examples to index")
    if factors is not None:
        factors.check(model, examples)
    with unchanged(model), files.alone():
        wanted: dict[str, Any] = {
            "model": model_fingerprint(model),
            "task": task_text(task),
            "code": code(),
            "seed": plan.seed,
            "damping": damping_record(plan.damping),
            "modules": None if plan.modules is None else list(plan.modules),
            "covariance_examples": plan.covariance_examples,
            "eigenvalue_examples": plan.eigenvalue_examples,
            "gradient": plan.gradient,
            "batch_size": plan.batch_size,
        }
        part = part_of(examples)
        if files.exists():
            record = files.record()
            _check_same(files, record, wanted, part, plan, factors)
        else:
            record = {
                **wanted,
                "parts": [part],
                "asked": {name: getattr(plan, name) for name in ("numbers", "sketch", "shard_examples")},
                "numbers": None,
                "sketch": None,
                "type": None,
                "shard_examples": None,
                "factors": None,
                "basis": None,
                "memory": min(allowed_memory(), _MEMORY),
            }
            files.write_record(record)
            files.write_names(0, examples.ids, examples.class_names)
        known = _kept_factors(files, record)
        if known is None:
            known = factors
            if known is None:
                known = fit_factors(
                    model,
                    examples,
                    task,
                    seed=derive_seed(plan.seed, "factors"),
                    modules=plan.modules,
                    covariance_examples=plan.covariance_examples,
                    eigenvalue_examples=plan.eigenvalue_examples,
                    batch_size=plan.batch_size,
                    workspace_bytes=plan.workspace_bytes,
                    progress=progress,
                )
            files.write_factors(known)
            record["factors"] = factors_digest(known)
            files.write_record(record)
        if record["numbers"] is None:
            free = shutil.disk_usage(files.directory).free
            size = size_of(plan, known, len(examples), where(model)[0], free)
            record.update(numbers=size.numbers, sketch=size.sketch, type=size.type)
            record["shard_examples"] = _shard_examples(plan, size)
            files.write_record(record)
        maker = Maker(files, record, model, task, known, plan.workspace_bytes)
        if not _basis_is_kept(files, record):
            maker.make_basis(examples, progress)
        make_shards(maker, examples, 0, plan.processes, executor, progress)


def append(
    files: IndexFiles,
    model: nn.Module,
    examples: Examples,
    task: Task,
    processes: int,
    executor: Executor | None,
    workspace_bytes: int | None,
    progress: Progress | None,
) -> None:
    """The work of `InfluenceIndex.append`."""
    check_executor(executor, model)
    if not len(examples):
        raise InputError(f"{examples.name}: there are no examples to append")
    part = part_of(examples)
    with unchanged(model), files.alone():
        record = files.record()
        if task_text(task) != record["task"]:
            raise MismatchError(
                f"{files.directory}: the index is of the task {record['task']}, not of this one"
            )
        if not same_part(record["parts"][-1], part) or len(record["parts"]) == 1:
            _drop_interrupted(files, record)
            files.write_names(len(record["parts"]), examples.ids, examples.class_names)
            record["parts"].append(part)
            files.write_record(record)
        maker = Maker(files, record, model, task, Factors.load(files.factors), workspace_bytes)
        first = sum(one["examples"] for one in record["parts"][:-1])
        make_shards(maker, examples, first, processes, executor, progress)


def _drop_interrupted(files: IndexFiles, record: dict[str, Any]) -> None:
    """Forget the examples whose appending was interrupted: their shards, then their part."""
    every, missing = files.missing(record)
    last = every[-1].first
    if last and missing and missing[0].first == last:
        for span in every:
            if span.first == last:
                files.shard(span).unlink(missing_ok=True)
        record["parts"].pop()
        files.write_record(record)


@final
@dataclass(frozen=True)
class RowSize:
    """m, D, and the type of the coordinates, "float16" or "int8"."""

    numbers: int
    sketch: int
    type: str = "float16"

    @property
    def quantised(self) -> bool:
        """Whether coordinates are int8."""
        return self.type == "int8"


def size_of(
    plan: Plan, factors: Factors, count: int, device: torch.device, free: int | None = None
) -> RowSize:
    """The defaults, or what fits into the memory.

    By default gradients are kept whole, and m and D are equal, where all of them take at most 8 GiB and a
    quarter of the disk: that is faster than to compute coordinates in the space of some and, in float16 up
    to 1 GiB, exact.

    Arguments:
        plan: the options.
        factors: of the model.
        count: examples.
        device: of the model.
        free: bytes of the disk, where there is one.

    Raises:
        InsufficientMemoryError: what is asked for does not fit, or hardly anything does.
    """
    limit = allowed_memory(device)
    every = factors.num_parameters
    if plan.numbers is None and (plan.sketch or every) >= every:
        for size, most in ((RowSize(every, every), _WHOLE), (RowSize(every, every, "int8"), _QUANTISED)):
            disk = count * row_bytes(every, size.quantised)
            fits = free is None or _SHARE * disk <= free
            if disk <= most and fits and bytes_needed(plan, factors, size, device) <= limit:
                return size
    numbers = min(plan.numbers or _NUMBERS, count)
    sketch = min(max(plan.sketch or _SKETCH, numbers), every)
    numbers = min(numbers, sketch)
    while (needed := bytes_needed(plan, factors, RowSize(numbers, sketch), device)) > limit:
        if plan.sketch is None and sketch > 32 * numbers and sketch > 2 * _LEAST:
            sketch //= 2
        elif plan.numbers is None and numbers > _LEAST:
            numbers //= 2
        elif plan.sketch is None and sketch > 2 * numbers:
            sketch //= 2
        else:
            raise InsufficientMemoryError(
                f"index: takes {in_words(needed)} of memory with {numbers} numbers an example from sketches "
                f"of {sketch}, but {in_words(limit)} may be taken; allow more, or name fewer modules"
            )
    return RowSize(numbers, sketch)


def bytes_needed(plan: Plan, factors: Factors, size: RowSize, device: torch.device) -> int:
    """The memory of the basis, which takes most: beside factors, signs and sketches of a batch."""
    squares = sum(
        part.numel()
        for layer in factors.layers.values()
        for part in (layer.input_basis, layer.output_basis)
        if part is not None
    )
    numbers, sketch = size.numbers, size.sketch
    fixed = 8 * (squares + factors.num_parameters) + 4 * factors.num_parameters
    if numbers == sketch:
        return fixed + sketch * (12 * plan.batch_size + 4 * _shard_examples(plan, size))
    return (
        fixed + sketch * (2 * quick_type(device).itemsize * numbers + 4 * plan.batch_size) + 24 * numbers**2
    )


def _shard_examples(plan: Plan, size: RowSize) -> int:
    """Rows of a shard: as asked for, but a shard of whole gradients is held in memory."""
    if size.numbers < size.sketch:
        return plan.shard_examples
    batches = _WHOLE_SHARD // (row_bytes(size.numbers, size.quantised) * plan.batch_size)
    return min(plan.shard_examples, max(1, batches) * plan.batch_size)


def _check_same(
    files: IndexFiles,
    record: dict[str, Any],
    wanted: dict[str, Any],
    part: dict[str, Any],
    plan: Plan,
    factors: Factors | None,
) -> None:
    words = {"code": "another version of unpoison", "model": "another model", "task": "another task"}
    for name, value in wanted.items():
        if record[name] != value:
            said = words.get(name, f"{name} {record[name]!r}, not {value!r}")
            raise MismatchError(f"{files.directory}: holds an index of {said}; name another directory")
    if not same_part(record["parts"][0], part):
        raise MismatchError(f"{files.directory}: holds an index of other examples; name another directory")
    for name, before in record["asked"].items():
        asked = getattr(plan, name)
        if asked not in (None, before, record[name]):
            raise MismatchError(
                f"{files.directory}: holds an index with {name} {before or record[name]}, not {asked}; name "
                "another directory"
            )
    if factors is not None and record["factors"] not in (None, factors_digest(factors)):
        raise MismatchError(f"{files.directory}: holds an index with other factors; name another directory")


def _kept_factors(files: IndexFiles, record: dict[str, Any]) -> Factors | None:
    """The factors that are there and sound."""
    if record["factors"] is None:
        return None
    try:
        factors = Factors.load(files.factors)
    except InputError:
        return None
    return factors if factors_digest(factors) == record["factors"] else None


def _basis_is_kept(files: IndexFiles, record: dict[str, Any]) -> bool:
    """Whether the basis is there, sound, and made with the factors."""
    try:
        _, made_of, known = read_tensors(files.basis)
    except InputError:
        return False
    return (made_of, known) == (record["factors"], record["basis"])


@final
@dataclass(frozen=True, eq=False)
class Maker:
    """Makes the basis and shards of the index that a record describes."""

    files: IndexFiles
    record: dict[str, Any]
    model: nn.Module
    task: Task
    factors: Factors
    workspace_bytes: int | None

    def sketcher(self) -> Sketcher:
        """Of the training examples."""
        record = self.record
        return Sketcher(
            self.model,
            self.factors,
            damping_of(record["damping"]),
            self.task.measurement if record["gradient"] == "measurement" else self.task.loss,
            dimensions=record["sketch"],
            seed=record["seed"],
            workspace_bytes=self.workspace_bytes,
            memory=record["memory"] if where(self.model)[0].type == "cpu" else None,
        )

    def make_basis(self, examples: Examples, progress: Progress | None) -> None:
        """An orthonormal basis of the sketches of random examples."""
        count, size = self.record["numbers"], self.record["batch_size"]
        if count == self.record["sketch"]:  # the space of all sketches
            count = 0
        order = torch.randperm(len(examples), generator=generator(self.record["seed"], "index basis"))
        chosen = order[:count].sort().values
        with self.sketcher() as sketcher:
            quick = quick_type(sketcher.device)
            units = torch.zeros(count, sketcher.dimensions, device=sketcher.device, dtype=quick)
            for start in range(0, count, size):
                rows = chosen[start : start + size]
                found = sketcher.batch(examples.at(rows), len(rows))
                units[start : start + len(rows)] = unit_rows(found.rows, found.lengths)
                if progress is not None:
                    progress("basis", start + len(rows), count)
        spanned = span_of(units) if count else {"basis": units, "leading": units.float()}
        tensors = {**spanned, "examples": chosen}
        known = write_tensors(self.files.basis, tensors, made_of=self.record["factors"])
        self.record["basis"] = known
        self.files.write_record(self.record)

    def make_shard(self, sketcher: Sketcher, space: Space, examples: Examples, span: Span) -> None:
        """The rows of the examples of a span."""
        size, rows = self.record["batch_size"], dict[str, Tensor]()
        for low in range(span.start, span.stop, size):
            high = min(low + size, span.stop)
            batch = examples.batch(low - span.first, high - span.first)
            found = sketcher.batch(batch, high - low)
            if not bool(found.lengths.isfinite().all()):
                raise InputError(
                    f"{examples.name}: gradients of the examples {low}..{high - 1} are not finite"
                )
            values, residuals = space.of(unit_rows(found.rows, found.lengths))
            kept = {
                **packed(values, self.record["type"] == "int8"),
                "residuals": residuals.half(),
                "lengths": found.lengths.double(),
                "norms": found.norms.double(),
                "values": found.values,
            }
            for name, column in kept.items():
                if name not in rows:
                    rows[name] = torch.empty(span.stop - span.start, *column.shape[1:], dtype=column.dtype)
                rows[name][low - span.start : high - span.start] = column
        rows["labels"] = examples.labels[span.start - span.first : span.stop - span.first]
        self.files.write_shard(span, rows, self.record["basis"])
