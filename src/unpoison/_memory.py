"""The peak memory of this process."""

from __future__ import annotations

import resource
import sys

import torch


def peak_bytes(device: torch.device | str = "cpu") -> int:
    """The peak resident memory of the process or, on CUDA, of its tensors, in bytes.

    >>> peak_bytes() > 1_000_000
    True
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilo = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo
