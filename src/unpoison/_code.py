"""Which code made a result."""

from __future__ import annotations


def code_digest() -> str:
    """A digest of the package's source."""
    return ""


def commit() -> str | None:
    """The commit of the checkout, if there is one."""
    return None
