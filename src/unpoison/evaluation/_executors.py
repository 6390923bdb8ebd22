"""Executors do stages in parallel: `LocalExecutor` in processes of this machine, `RayExecutor` on a cluster.

An executor takes stages and returns outcomes, in any order; `_sweep` decides what may be done when. Both do a
stage with the same function in worker processes with the same number of threads, so both give the same rows.
A worker that dies is replaced and its stage done by another; artefacts appear whole or not at all.

This module does not import torch.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from abc import abstractmethod
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, final

from unpoison.errors import InputError, MissingExtraError
from unpoison.evaluation._store import Outcome, Stage, perform
from unpoison.registry import PLUGINS

_ATTEMPTS = 3
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Executor(AbstractContextManager[Any]):
    """Does stages in parallel; a context manager, at whose end all workers are stopped.

    Arguments:
        workers: how many stages at a time; the number of cores over `threads` when None.
        threads: of each worker.

    Raises:
        InputError: fewer than one worker.
    """

    def __init__(self, workers: int | None = None, *, threads: int = 1) -> None:
        if workers is not None and workers < 1:
            raise InputError(f"workers: needs at least 1, found {workers}")
        self.workers = max(1, cores() // threads) if workers is None else workers
        self.threads = threads

    @abstractmethod
    def submit(self, root: Path, stage: Stage) -> None:
        """Queue the stage; its artefact is put into the store at `root`."""

    @abstractmethod
    def wait(self) -> list[Outcome]:
        """Outcomes of submitted stages, at least one; to be called only while some are not finished."""

    @abstractmethod
    def close(self) -> None:
        """Stop the workers, whatever they are doing."""

    @final
    def __exit__(self, *exception: object) -> None:
        self.close()


def cores() -> int:
    """How many processor cores this process may use."""
    with contextlib.suppress(AttributeError):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@final
class LocalExecutor(Executor):
    """Processes on this machine. The arguments are those of `Executor`."""

    def __init__(self, workers: int | None = None, *, threads: int = 1) -> None:
        super().__init__(workers, threads=threads)
        self._pool = self._start()
        self._running: dict[Future[Outcome], tuple[Path, Stage, int]] = {}

    def submit(self, root: Path, stage: Stage) -> None:
        self._submit(root, stage, 1)

    def wait(self) -> list[Outcome]:
        outcomes: list[Outcome] = []
        while not outcomes:
            done, _ = concurrent.futures.wait(self._running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                root, stage, attempt = self._running.pop(future)
                try:
                    outcomes.append(future.result())
                except (BrokenProcessPool, concurrent.futures.CancelledError):
                    # When one worker dies the pool gives up all its stages.
                    if attempt < _ATTEMPTS:
                        self._submit(root, stage, attempt + 1)
                    else:
                        outcomes.append(_died(stage))
        return outcomes

    def close(self) -> None:
        processes = list((self._pool._processes or {}).values())
        for process in processes:
            process.terminate()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._running.clear()

    def _submit(self, root: Path, stage: Stage, attempt: int) -> None:
        try:
            future = self._pool.submit(perform, str(root), stage)
        except BrokenProcessPool:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = self._start()
            future = self._pool.submit(perform, str(root), stage)
        self._running[future] = (root, stage, attempt)

    def _start(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            self.workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_initialize,
            initargs=(self.threads, os.getpid()),
        )


@final
class RayExecutor(Executor):
    """Workers of a Ray cluster; a local one is started when none is named.

    The store and the data must have the same paths on every node.

    Arguments:
        workers: as for `Executor`; the cluster's cores count.
        threads: cores of each worker.
        address: of the cluster ("auto" for the one this machine is part of); None starts one here.
        gpu_share: of a GPU for each stage, in [0, 1]: .25 lets four stages share one.

    Raises:
        InputError: fewer than one worker, or a stage needs more than the cluster has.
        MissingExtraError: Ray is not installed.
    """

    def __init__(
        self,
        workers: int | None = None,
        *,
        threads: int = 1,
        address: str | None = None,
        gpu_share: float = 0.0,
    ) -> None:
        try:
            # Its notice about tokens is for clusters that several people share; a value that is set stays.
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")
            import ray
        except ImportError:
            raise MissingExtraError(
                "the executor ray needs Ray, which is not installed; pip install 'unpoison[ray]'"
            ) from None
        super().__init__(workers, threads=threads)
        if not 0 <= gpu_share <= 1:
            raise InputError(f"gpu_share: {gpu_share:g} is outside 0..1")
        self._ray = ray
        variables = {name: str(threads) for name in _THREAD_VARIABLES}
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        if PLUGINS in os.environ:
            variables[PLUGINS] = os.environ[PLUGINS]
        # One process a worker, which is reused: a new one would import torch for every stage.
        own = {"address": "local", "num_cpus": self.workers * threads, "include_dashboard": False}
        ray.init(
            **(own if address is None else {"address": address}),
            logging_level=logging.ERROR,
            log_to_driver=False,
            runtime_env={"env_vars": variables},
        )
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        # Ray would wait for ever for resources that the cluster does not have.
        for name, needed in (("CPU", float(threads)), ("GPU", gpu_share)):
            if resources.get(name, 0.0) < needed:
                ray.shutdown()
                raise InputError(
                    f"Ray: a stage needs {needed:g} {name}, the cluster has {resources.get(name, 0.0):g}"
                )
        if workers is None:
            self.workers = max(1, int(resources["CPU"]) // threads)
        self._perform = ray.remote(perform).options(
            num_cpus=threads, num_gpus=gpu_share, max_retries=_ATTEMPTS - 1
        )
        self._running: dict[Any, Stage] = {}

    def submit(self, root: Path, stage: Stage) -> None:
        # Ray's processes have a working directory of their own.
        self._running[self._perform.remote(str(root.absolute()), stage)] = stage

    def wait(self) -> list[Outcome]:
        done, _ = self._ray.wait(list(self._running), num_returns=1)
        outcomes = []
        for reference in done:
            stage = self._running.pop(reference)
            try:
                outcomes.append(self._ray.get(reference))
            except self._ray.exceptions.WorkerCrashedError:
                outcomes.append(_died(stage))
            except self._ray.exceptions.RayError as error:
                outcomes.append(
                    Outcome(stage.key, error=" ".join(f"{type(error).__name__}: {error}".split()))
                )
        return outcomes

    def close(self) -> None:
        for reference in self._running:
            with contextlib.suppress(Exception):
                self._ray.cancel(reference, force=True)
        self._running.clear()
        self._ray.shutdown()


def _initialize(threads: int, parent: int) -> None:
    """Set up a new worker: it leaves Ctrl-C to its parent, and ends when its parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for name in _THREAD_VARIABLES:  # torch reads them when it is imported, later
        os.environ[name] = str(threads)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _died(stage: Stage) -> Outcome:
    return Outcome(
        stage.key, error=f"the worker died {_ATTEMPTS} times in this stage ({stage.kind}); out of memory?"
    )
