"""The one thing that takes no generator: dropout and its like draw from the global ones.

Whoever runs a network in training mode does so within `own_randomness`: the global generators are seeded
there, and are afterwards as they were before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def own_randomness(
    device: torch.device, *, seed: int | None = None, deterministic: bool = False
) -> Iterator[None]:
    """Give back the global generators of the CPU and of `device` when the block ends, however it ends.

    Arguments:
        device: where the network lies.
        seed: of these generators within the block; None leaves it to the block (`seed_global_generators`).
        deterministic: have cuDNN choose kernels that repeat bit for bit.

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
    """Seed the global generators of the CPU and of `device`, and no other: unlike `torch.manual_seed`."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
