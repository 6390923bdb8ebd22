"""Puts this folder on the path: the benchmark and the tests share its kinds."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
