"""The attacks by name; see `unpoison.registry`. This module does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unpoison.registry import Registry

if TYPE_CHECKING:
    from unpoison.attacks._attack import Attack

METHODS: Registry[Attack] = Registry("attack", "unpoison.attacks")
register, names, describe, get = METHODS.register, METHODS.names, METHODS.describe, METHODS.get
