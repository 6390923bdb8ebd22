"""The shards of an `InfluenceIndex` are made here one after the other, or each by a worker of an executor.

A worker has the model, the examples and the record of the index, and reads the basis from its directory. The
processes of this machine are forked, so that they share the memory of this one, with a thread each. One that
dies is replaced, and its shard is made by another.
"""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, final

from torch import nn

from unpoison._executors import Executor, LocalExecutor, shared
from unpoison._progress import Progress
from unpoison.data import Examples
from unpoison.errors import InputError
from unpoison.influence._factors import Factors
from unpoison.influence._index_files import IndexFiles, Span, read_tensors, spans
from unpoison.influence._index_space import Space
from unpoison.influence._sweep import where

if TYPE_CHECKING:
    from unpoison.influence._index_build import Maker


def make_shards(
    maker: Maker,
    examples: Examples,
    first: int,
    processes: int,
    executor: Executor | None,
    progress: Progress | None,
) -> None:
    """Make what is missing or damaged of the shards of the part that begins at `first`.

    Raises:
        InputError: what the first worker says that failed.
    """
    record, files = maker.record, maker.files
    own = [one for one in spans(record["parts"], record["shard_examples"]) if one.first == first]
    missing = [one for one in own if not files.is_sound(one, record["basis"])]
    for span in missing:
        files.shard(span).unlink(missing_ok=True)
    told = _Told(progress, own)
    told.done(*(one for one in own if one not in missing))
    workers = min(processes, len(missing))
    if executor is not None and missing:
        _deal_out(executor, _sent(maker, examples, executor), missing, told)
    elif workers > 1 and _can_fork(maker.model):
        with LocalExecutor(workers, start="fork") as forked:
            # A copy has its own way to read ahead.
            _deal_out(forked, _Work(maker, copy.copy(examples)), missing, told)
    elif missing:
        work = _Work(maker, examples)
        for span in missing:
            work.make(span)
            told.done(span)


def check_executor(executor: Executor | None, model: nn.Module) -> None:
    """That workers can take the model.

    Raises:
        InputError: it is on a GPU, and they are not.
    """
    if executor is not None and where(model)[0].type == "cuda" and not executor.on_gpu:
        raise InputError(
            "index: the model is on a GPU; say by gpu_share how much of one each worker needs, 1 or a part"
        )


@final
class _Told:
    """Progress in examples."""

    def __init__(self, progress: Progress | None, every: Sequence[Span]) -> None:
        self.progress, self.total, self.count = progress, _examples(every), 0

    def done(self, *made: Span) -> None:
        """These shards are there."""
        self.count += _examples(made)
        if self.progress is not None and made:
            self.progress("index", self.count, self.total)


def _examples(every: Sequence[Span]) -> int:
    return sum(one.stop - one.start for one in every)


@final
@dataclass(frozen=True, eq=False)
class _Work:
    """What a worker needs.

    Arguments:
        maker: with the model, where it is to be used.
        examples: of the part.
        on_gpu: whether to take the model to the worker's GPU.
    """

    maker: Maker
    examples: Examples
    on_gpu: bool = False

    @cached_property
    def placed(self) -> Maker:
        """The maker, with the model on the worker's device."""
        return replace(self.maker, model=self.maker.model.to("cuda")) if self.on_gpu else self.maker

    @cached_property
    def space(self) -> Space:
        """The space of the basis."""
        tensors = read_tensors(self.maker.files.basis, check=False)[0]
        return Space.of_record(tensors, self.maker.record, where(self.placed.model)[0])

    def make(self, span: Span) -> None:
        """A shard."""
        with self.placed.sketcher() as sketcher:
            self.placed.make_shard(sketcher, self.space, self.examples, span)


def _make(span: Span) -> None:
    shared().make(span)


def _sent(maker: Maker, examples: Examples, executor: Executor) -> _Work:
    """What workers get that may be on other machines: nothing that is on a GPU of this one."""
    files = IndexFiles(maker.files.directory.absolute())
    sent = replace(maker, files=files)
    if where(maker.model)[0].type != "cpu":
        model = copy.deepcopy(maker.model).to("cpu")
        sent = replace(sent, model=model, factors=Factors.load(files.factors))
    if examples.device.type != "cpu" and hasattr(examples, "to"):
        examples = examples.to("cpu")
    return _Work(sent, examples, executor.on_gpu)


def _deal_out(executor: Executor, work: _Work, missing: Sequence[Span], told: _Told) -> None:
    """Have the shards made by workers, no more at a time than there are: what waits loses no attempt."""
    executor.share(work)
    waiting, running = list(missing)[::-1], dict[str, Span]()
    while waiting or running:
        while waiting and len(running) < executor.workers:
            span = waiting.pop()
            running[str(span.start)] = span
            executor.submit(str(span.start), _make, span)
        for done in executor.wait():
            if done.error is not None:
                raise InputError(f"{work.maker.files.directory}: {done.error}")
            told.done(running.pop(done.key))


def _can_fork(model: nn.Module) -> bool:
    return where(model)[0].type == "cpu" and "fork" in multiprocessing.get_all_start_methods()
