"""The unlearners by name; see `unpoison.registry`. This module does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unpoison.registry import Registry

if TYPE_CHECKING:
    from unpoison.unlearners._unlearner import Unlearner

METHODS: Registry[Unlearner] = Registry("unlearner", "unpoison.unlearners")
register, names, describe, get = METHODS.register, METHODS.names, METHODS.describe, METHODS.get
