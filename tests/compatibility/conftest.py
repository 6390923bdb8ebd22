"""Puts this folder on the path: the benchmark and the tests share its kinds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "compat: needs packages of the extra 'compat', which unpoison never imports"
    )
