"""The test-time detectors by name; see `unpoison.registry`. This module does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unpoison.registry import Registry

if TYPE_CHECKING:
    from unpoison.input_detectors._input_detector import InputDetector

METHODS: Registry[InputDetector] = Registry("input detector", "unpoison.input_detectors")
register, names, describe, get = METHODS.register, METHODS.names, METHODS.describe, METHODS.get
