"""Logits as networks return them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from runs import draw_logits


@pytest.fixture
def drawn() -> tuple[Tensor, Tensor]:
    return draw_logits((120, 120, 120, 120))
