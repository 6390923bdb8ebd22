"""The exceptions of the package.

Every error that is raised on purpose is an `UnpoisonError`. Its message is one line that says what was wrong,
where, and what to do about it; the command prints that line and ends with status 2 for `InputError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UnpoisonError(Exception):
    """Base class of every error that unpoison raises on purpose."""

    def __str__(self) -> str:
        """The message on one line, whatever names of files and classes it holds."""
        return printable(super().__str__())


class InputError(UnpoisonError, ValueError):
    """An input cannot be used: a file, a row, an argument, a model."""


class MismatchError(InputError):
    """Two things that belong together do not match, e.g. a `PoisonSet` and another training set."""


class InsufficientMemoryError(InputError, MemoryError):
    """What was asked for takes more memory than may be taken; the message says what would fit."""


class TrainingDivergedError(UnpoisonError, ArithmeticError):
    """The training loss is no longer finite."""


class MissingExtraError(UnpoisonError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The hint after an unknown word: the nearest of the known ones, else all of them.

    >>> nearest("bugdet", ["budget", "trigger"])
    "did you mean 'budget'?"
    >>> nearest("x", ["budget", "trigger"])
    'there are budget, trigger'
    """
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"there are {', '.join(names)}" if names else "there are none"


def one_line(error: BaseException) -> str:
    """The message of another library's error on one line; the name of its type where it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def printable(text: str) -> str:
    """Text on one line, with control and format characters as escapes.

    They come in names of files and classes, and could move the cursor or turn the direction of a line.

    >>> printable("a\\nb\\u202ec")
    'a\\\\nb\\\\u202ec'
    """
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)
