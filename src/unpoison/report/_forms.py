"""The forms in which findings are exported; free of torch, for the help of the command."""

from __future__ import annotations

from typing import Literal

Form = Literal["csv", "parquet", "json", "list", "unflagged-list", "folder", "sarif", "cyclonedx", "markdown"]
"""See `write_findings`."""
