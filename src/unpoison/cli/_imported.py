"""Functions of the user's own, named as `package.module:function`."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch

from unpoison.errors import InputError, UnpoisonError

_SPEC: Final = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def names_function(spec: str) -> bool:
    """Whether a word has the form `package.module:function` and is no file or folder that is there."""
    return _SPEC.fullmatch(spec) is not None and not Path(spec).exists()


def imported(option: str, spec: str, *, known: str, makes: str) -> Callable[..., Any]:
    """The function that `package.module:function` names; the current directory is importable.

    Arguments:
        option: the option that it was given to, for messages.
        spec: as given.
        known: what else the option takes, for messages.
        makes: what the function is for, for messages.

    Raises:
        InputError: the module cannot be imported, or there is no such function in it.
    """
    where = f"{option} {spec}"
    if _SPEC.fullmatch(spec) is None:
        raise InputError(f"{where}: {known}")
    place, _, name = spec.partition(":")
    with current_directory_importable():
        try:
            found: Any = importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is not None and (place == error.name or place.startswith(f"{error.name}.")):
                raise InputError(
                    f"{where}: there is no module {error.name!r} in the current directory or installed"
                ) from None
            raise InputError(f"{where}: importing {place} failed: {error}") from error
        except UnpoisonError:
            raise
        except Exception as error:
            raise InputError(
                f"{where}: importing {place} failed ({type(error).__name__}: {error})"
            ) from error
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise InputError(f"{where}: module {place} has no {name!r}") from None
    if not callable(found):
        raise InputError(f"{where}: {name} is {type(found).__name__}, not a function that makes {makes}")
    function: Callable[..., Any] = found
    return function


def made(option: str, spec: str, function: Callable[[], Any], *, called: str = "function") -> Any:
    """What the function gives; the global random state is left as it was.

    Raises:
        InputError: it fails.
    """
    try:
        with current_directory_importable(), torch.random.fork_rng():
            return function()
    except UnpoisonError:
        raise
    except Exception as error:
        raise InputError(f"{option} {spec}: the {called} failed ({type(error).__name__}: {error})") from error


@contextmanager
def current_directory_importable() -> Iterator[None]:
    """Within the block, modules of the current directory can be imported."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(here)
