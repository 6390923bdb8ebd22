"""Puts this folder on the path: the benchmark and the tests share its kinds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from unpoison.unlearners import _further

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def few_steps_of_each_learning_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a kind is accepted shows after a few steps; `benchmarks.compatibility` takes all of them."""
    monkeypatch.setattr(_further, "STEPS", 8)
