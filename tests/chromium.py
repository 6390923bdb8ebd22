"""The browser of the tests that open a page."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
    None,
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
MARKS = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the path"),
]


def in_browser(test: Callable[..., Any]) -> Callable[..., Any]:
    """Marks one test of a file."""
    for mark in MARKS:
        test = mark(test)
    return test
