"""Executors call functions in workers: `LocalExecutor` on this machine, `RayExecutor` on a cluster.

An executor takes calls and gives what they returned, in any order. Workers have a stated number of threads,
so what depends on it is the same wherever it is computed. A worker that dies is replaced and its calls are
made again by another, so a call must leave its result whole or not at all.

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
import warnings
from abc import abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, final

from unpoison.errors import InputError, MissingExtraError, UnpoisonError
from unpoison.registry import PLUGINS

_ATTEMPTS = 3
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@final
@dataclass(frozen=True)
class Done:
    """A call that ended.

    Arguments:
        key: what it was submitted under.
        value: what it returned.
        error: one line where it failed or its worker died, else None.
    """

    key: str
    value: Any = None
    error: str | None = None


@final
@dataclass(frozen=True)
class _Call:
    key: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    attempt: int = 1

    def died(self) -> Done:
        return Done(self.key, error=f"the worker died {_ATTEMPTS} times; out of memory?")


class Executor(AbstractContextManager[Any]):
    """Calls functions in parallel; a context manager, at whose end all workers are stopped.

    Arguments:
        workers: how many calls at a time; the number of cores over `threads` when None.
        threads: of each worker.

    Raises:
        InputError: fewer than one worker.
    """

    def __init__(self, workers: int | None = None, *, threads: int = 1) -> None:
        if workers is not None and workers < 1:
            raise InputError(f"workers: needs at least 1, found {workers}")
        self.workers = max(1, cores() // threads) if workers is None else workers
        self.threads = threads

    @property
    def on_gpu(self) -> bool:
        """Whether every worker has a GPU, or a share of one, that this process need not have."""
        return False

    @abstractmethod
    def share(self, value: Any) -> None:
        """What calls get by `shared`, sent to each worker once; to be called before any call is submitted."""

    @abstractmethod
    def submit(self, key: str, function: Callable[..., Any], *arguments: Any) -> None:
        """Queue a call of a function that workers can import."""

    @abstractmethod
    def wait(self) -> list[Done]:
        """What has ended, at least one; to be called only while something was submitted and has not."""

    @abstractmethod
    def close(self) -> None:
        """Stop the workers, whatever they are doing."""

    @final
    def __exit__(self, *exception: object) -> None:
        self.close()


_SHARED: list[Any] = [None]


def shared() -> Any:
    """In a worker, the value of `Executor.share`."""
    return _SHARED[0]


def cores() -> int:
    """How many processor cores this process may use."""
    with contextlib.suppress(AttributeError):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@final
class LocalExecutor(Executor):
    """Processes on this machine.

    Arguments:
        workers: as for `Executor`, like `threads`.
        threads: of each worker.
        start: how processes begin. "fork" shares the memory of this one, and what is shared need not be
            picklable; each has one thread, as OpenMP waits for ever for the threads that a fork left behind.

    Raises:
        InputError: fewer than one worker, or a fork is to have several threads.
    """

    def __init__(
        self, workers: int | None = None, *, threads: int = 1, start: Literal["spawn", "fork"] = "spawn"
    ) -> None:
        super().__init__(workers, threads=threads)
        if start == "fork" and threads > 1:
            raise InputError(f"threads: a forked process has one, found {threads}; begin by spawn")
        self._start_method, self._value = start, None
        self._pool = self._start()
        self._running: dict[Future[Done], _Call] = {}

    def share(self, value: Any) -> None:
        self._value = value
        self._pool.shutdown()
        self._pool = self._start()

    def submit(self, key: str, function: Callable[..., Any], *arguments: Any) -> None:
        self._submit(_Call(key, function, arguments))

    def wait(self) -> list[Done]:
        ended: list[Done] = []
        while not ended:
            done, _ = concurrent.futures.wait(self._running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                call = self._running.pop(future)
                try:
                    ended.append(future.result())
                except (BrokenProcessPool, concurrent.futures.CancelledError):
                    # When one worker dies the pool gives up all its calls.
                    if call.attempt < _ATTEMPTS:
                        self._submit(_Call(call.key, call.function, call.arguments, call.attempt + 1))
                    else:
                        ended.append(call.died())
        return ended

    def close(self) -> None:
        processes = list((self._pool._processes or {}).values())
        for process in processes:
            process.terminate()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._running.clear()

    def _submit(self, call: _Call) -> None:
        # Python warns of forks beside threads; those of torch are not used after the fork.
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            try:
                future = self._pool.submit(_ended, call)
            except BrokenProcessPool:
                self._pool.shutdown(wait=True, cancel_futures=True)
                self._pool = self._start()
                future = self._pool.submit(_ended, call)
        self._running[future] = call

    def _start(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            self.workers,
            mp_context=multiprocessing.get_context(self._start_method),
            initializer=_initialize,
            initargs=(self.threads, os.getpid(), self._value),
        )


@final
class RayExecutor(Executor):
    """Workers of a Ray cluster; a local one is started when none is named.

    What calls read and write must have the same paths on every node.

    Arguments:
        workers: as for `Executor`; the cluster's cores count.
        threads: cores of each worker.
        address: of the cluster ("auto" for the one this machine is part of); None starts one here.
        gpu_share: of a GPU for each call, in [0, 1]: .25 lets four share one.

    Raises:
        InputError: fewer than one worker, or a call needs more than the cluster has.
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
        self._ray, self._gpu_share = ray, gpu_share
        variables = {name: str(threads) for name in _THREAD_VARIABLES}
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        if PLUGINS in os.environ:
            variables[PLUGINS] = os.environ[PLUGINS]
        # One process a worker, which is reused: a new one would import torch for every call.
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
                    f"Ray: a worker needs {needed:g} {name}, the cluster has {resources.get(name, 0.0):g}"
                )
        if workers is None:
            self.workers = max(1, int(resources["CPU"]) // threads)
        self._remote = ray.remote(_ended_on_ray).options(
            num_cpus=threads, num_gpus=gpu_share, max_retries=_ATTEMPTS - 1
        )
        self._value: Any = None
        self._running: dict[Any, _Call] = {}

    @property
    def on_gpu(self) -> bool:
        return self._gpu_share > 0

    def share(self, value: Any) -> None:
        self._value = self._ray.put(value)

    def submit(self, key: str, function: Callable[..., Any], *arguments: Any) -> None:
        call = _Call(key, function, arguments)
        # Within a list, so that Ray does not fetch it for every call.
        self._running[self._remote.remote(call, [self._value])] = call

    def wait(self) -> list[Done]:
        done, _ = self._ray.wait(list(self._running), num_returns=1)
        ended = []
        for reference in done:
            call = self._running.pop(reference)
            try:
                ended.append(self._ray.get(reference))
            except self._ray.exceptions.WorkerCrashedError:
                ended.append(call.died())
            except self._ray.exceptions.RayError as error:
                ended.append(Done(call.key, error=_line(error)))
        return ended

    def close(self) -> None:
        for reference in self._running:
            with contextlib.suppress(Exception):
                self._ray.cancel(reference, force=True)
        self._running.clear()
        self._ray.shutdown()


def _ended(call: _Call) -> Done:
    """Make a call; what every worker does."""
    try:
        return Done(call.key, call.function(*call.arguments))
    except UnpoisonError as error:
        return Done(call.key, error=" ".join(str(error).split()))
    except Exception as error:
        return Done(call.key, error=_line(error))


def _ended_on_ray(call: _Call, value: list[Any]) -> Done:
    if value[0] is not None and getattr(_ended_on_ray, "known", None) != value[0]:
        import ray

        _SHARED[0] = ray.get(value[0])
        _ended_on_ray.known = value[0]  # type: ignore[attr-defined]
    return _ended(call)


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _initialize(threads: int, parent: int, value: Any) -> None:
    """Set up a new worker: it leaves Ctrl-C to its parent, and ends when its parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for name in _THREAD_VARIABLES:  # torch reads them when it is imported, later
        os.environ[name] = str(threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    _SHARED[0] = value
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
