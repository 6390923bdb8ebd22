"""`serve`: the server of the page, on this machine."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING

from unpoison.app._guard import is_loopback
from unpoison.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from unpoison.app._case import Case

SHORTEST_TOKEN = 16


def check_address(host: str, token: str | None) -> None:
    """Refuse an address that others reach without a token of the user's own, and tokens that can be guessed.

    Raises:
        InputError: one of them is wrong.
    """
    if token is None and not is_loopback(host):
        raise InputError(
            f"--host {host}: other machines reach this address; give a --token that only you know, or leave "
            "--host out"
        )
    if token is not None and (len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable()):
        raise InputError(f"--token: expected {SHORTEST_TOKEN} or more printable ASCII characters")


def serve(
    case: Case,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | None = None,
    ready: Callable[[str], None] = lambda address: None,
) -> None:
    """Serve the page until the process is interrupted.

    Once in a process: NiceGUI has one application.

    Arguments:
        case: what it is about.
        host: the address to listen on.
        port: the port; a free one when 0.
        token: what the address of the page holds; a random one when None.
        ready: called with that address when the page can be opened.

    Raises:
        InputError: the address needs a token, or a run directory cannot be read.
        MissingExtraError: the extra `app` is not installed.
    """
    check_address(host, token)
    try:
        import nicegui  # noqa: F401
    except ImportError:
        raise MissingExtraError(
            'the page needs NiceGUI, which is not installed; pip install "unpoison[app]"'
        ) from None
    from unpoison.app._server import run
    from unpoison.app._work import Work

    run(Work(case), host=host, port=port, token=token or secrets.token_urlsafe(24), ready=ready)
