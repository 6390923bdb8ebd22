"""Seeding of the global generators, from which dropout and similar layers draw.

Networks run in training mode within `own_randomness`, which seeds the global generators and restores them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def own_randomness(
    device: torch.device, *, seed: int | None = None, deterministic: bool = False
) -> Iterator[None]:
    """Restore the global generators of the CPU and of `device` when the block ends, also by an error.

    Arguments:
        device: where the network lies.
        seed: of these generators within the block; None leaves them to the block (`seed_global_generators`).
        deterministic: let cuDNN choose only kernels that repeat bit for bit.

    >>> before = torch.get_rng_state()
    >>> with own_randomness(torch.device("cpu"), seed=1):
    ...     dropped = torch.nn.functional.dropout(torch.ones(4))
    >>> torch.equal(before, torch.get_rng_state())
    True
    """
    indices = [device.index or 0] if device.type == "cuda" else []
    kernels = (
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
        if deterministic
        else contextlib.nullcontext()
    )
    with torch.random.fork_rng(devices=indices), kernels:
        if seed is not None:
            seed_global_generators(seed, device)
        yield


def seed_global_generators(seed: int, device: torch.device) -> None:
    """Seed the global generators of the CPU and of `device`; unlike `torch.manual_seed`, no others."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
