"""The detectors by name; see `unpoison.registry`. This module does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unpoison.registry import Registry

if TYPE_CHECKING:
    from unpoison.detectors._detector import Detector

METHODS: Registry[Detector] = Registry("detector", "unpoison.detectors")
register, names, describe, get = METHODS.register, METHODS.names, METHODS.describe, METHODS.get
