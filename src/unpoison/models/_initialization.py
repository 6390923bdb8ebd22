"""Random initialisation that leaves the global random state as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def seeded_initialization(seed: int) -> Iterator[None]:
    """Within the block, torch's own initialisers draw on the CPU from `seed`; afterwards nothing has changed.

    Only the CPU generator is seeded: `torch.manual_seed` would also reset those of the accelerators, which
    `fork_rng` restores only at the price of a synchronisation.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield
