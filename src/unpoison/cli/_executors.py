"""The executor that a command names."""

from __future__ import annotations

from unpoison.cli._options import ExecutorOptions
from unpoison.errors import InputError
from unpoison.evaluation import RayExecutor


def check_place(options: ExecutorOptions) -> None:
    """That what is said of Ray is said with it.

    Raises:
        InputError: it is not.
    """
    if options.executor == "local" and (options.ray_address is not None or options.gpu_share):
        raise InputError("--ray-address and --gpu-share: are for --executor ray")


def ray_executor(options: ExecutorOptions, workers: int | None, threads: int) -> RayExecutor | None:
    """The workers of a Ray cluster, where they are asked for; to be closed."""
    if options.executor == "local":
        return None
    return RayExecutor(workers, threads=threads, address=options.ray_address, gpu_share=options.gpu_share)
