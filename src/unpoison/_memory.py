"""The peak memory of this process, and what is free. This module does not import torch."""

from __future__ import annotations

import sys


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


def free_bytes() -> int:
    """How much memory a process can take now, in bytes; 8 GB where the system does not say.

    >>> free_bytes() > 1_000_000
    True
    """
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:  # not on Linux
        pass
    return 8_000_000_000
