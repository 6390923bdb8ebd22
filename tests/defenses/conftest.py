"""Logits as networks give them: most examples sure, some not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


def draw_logits(counts: tuple[int, ...], *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits Float[n classes] and labels Int64[n], classes one after the other."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    logits = torch.randn(len(labels), len(counts), generator=generator)
    logits[torch.arange(len(labels)), labels] += 2 + 6 * torch.rand(len(labels), generator=generator)
    return logits, labels


@pytest.fixture
def drawn() -> tuple[Tensor, Tensor]:
    return draw_logits((120, 120, 120, 120))
