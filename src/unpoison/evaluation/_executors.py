"""The executors of sweeps, those of all work in parallel: see `unpoison._executors`."""

from unpoison._executors import Executor, LocalExecutor, RayExecutor

__all__ = ["Executor", "LocalExecutor", "RayExecutor"]
