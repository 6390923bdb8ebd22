"""The peak memory of this process, and what is free. This module does not import torch."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_bytes(device: object = "cpu") -> int:
    """The peak resident memory of the process or, on CUDA, of its tensors, in bytes; 0 on Windows.

    Arguments:
        device: a `torch.device`, or its name.

    >>> peak_bytes() > 1_000_000
    True
    """
    if str(device).startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(str(device))
    try:
        import resource
    except ImportError:  # on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_memory() -> int | None:
    """Bytes that can be allocated without swapping; None where that is not known."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
