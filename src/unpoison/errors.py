"""What can go wrong, by who has to act on it.

Every error the library raises on purpose is an `UnpoisonError`. Its message is one line that says what was
wrong, where, and what to do about it; the command prints that line and ends with status 2 for `InputError`.
"""

from __future__ import annotations


class UnpoisonError(Exception):
    """Base class of every error that unpoison raises on purpose."""


class InputError(UnpoisonError, ValueError):
    """Something given by the caller cannot be used: a file, a row, an argument, a model."""


class MismatchError(InputError):
    """Two things that belong together do not match, e.g. a `PoisonSet` and another training set."""


class TrainingDivergedError(UnpoisonError, ArithmeticError):
    """The training loss stopped being a finite number."""


class MissingExtraError(UnpoisonError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""
