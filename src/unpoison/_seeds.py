"""Randomness without global state: every consumer gets a generator derived from the seed and its own name."""

from __future__ import annotations

import hashlib
import operator
from typing import Any

import torch

from unpoison.errors import InputError


def as_seed(value: Any) -> int:
    """A seed as Python's own whole number, which can be stored.

    Raises:
        InputError: it is none.
    """
    try:
        return operator.index(value)
    except TypeError:
        raise InputError(f"seed must be a whole number, found {value!r}") from None


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the consumer called `names`, independent of all others derived from `seed`.

    >>> derive_seed(1, "epoch", 3) == derive_seed(1, "epoch", 3)
    True
    >>> derive_seed(1, "epoch", 3) == derive_seed(1, "epoch", 4)
    False
    """
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *names: str | int, device: str | torch.device = "cpu") -> torch.Generator:
    """A fresh `torch.Generator` for the consumer called `names`."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, *names))
