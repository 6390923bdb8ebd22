"""`listen` and `serve`: the server of the page, on this machine."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from unpoison.app._guard import is_loopback
from unpoison.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from unpoison.app._case import Case

SHORTEST_TOKEN = 16


@final
@dataclass(frozen=True, kw_only=True)
class Listening:
    """An address that is taken, and the token that opens the page there. Made by `listen`.

    Arguments:
        host: the address.
        token: what opens the page.
        socket: bound to the address; closed by whoever made it.
    """

    host: str
    token: str
    socket: socket.socket


def listen(host: str = "127.0.0.1", port: int = 0, token: str | None = None) -> Listening:
    """Take an address to serve the page at; done first, so that it is not refused after data was read.

    Arguments:
        host: the address to listen on.
        port: the port; a free one when 0.
        token: what the address of the page holds; a random one when None.

    Raises:
        InputError: the address needs a token, or cannot be listened on.
        MissingExtraError: the extra `app` is not installed.
    """
    host = host.strip("[]")
    check_address(host, token)
    try:
        import nicegui  # noqa: F401
    except ImportError:
        raise MissingExtraError(
            'the page needs NiceGUI, which is not installed; pip install "unpoison[app]"'
        ) from None
    if not 0 <= port < 1 << 16:
        raise InputError(f"--port {port}: expected a port up to 65535, or 0 for a free one")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        taken = socket.socket(family, kind, protocol)
        try:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(address)
        except OSError:
            taken.close()
            raise
    except (OSError, UnicodeError) as error:
        told = getattr(error, "strerror", None) or error
        raise InputError(
            f"--host {host} --port {port}: cannot be listened on ({told}); leave --port out for a free one"
        ) from None
    return Listening(host=host, token=token or secrets.token_urlsafe(24), socket=taken)


def check_address(host: str, token: str | None) -> None:
    """Refuse an address that others reach without a token of the user's own, and tokens that can be guessed.

    Raises:
        InputError: one of them is wrong.
    """
    if not host:
        raise InputError("--host: is empty; name an address, such as 127.0.0.1")
    if token is None and not is_loopback(host):
        raise InputError(
            f"--host {host}: other machines reach this address; give a --token that only you know, or leave "
            "--host out"
        )
    if token is not None and (len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable()):
        raise InputError(f"--token: expected {SHORTEST_TOKEN} or more printable ASCII characters")


def serve(case: Case, at: Listening, *, ready: Callable[[str], None] = lambda address: None) -> None:
    """Serve the page until the process is interrupted.

    Once in a process: NiceGUI has one application.

    Arguments:
        case: what it is about.
        at: where.
        ready: called with the address of the page when it can be opened.

    Raises:
        InputError: a run directory cannot be read.
    """
    from unpoison.app._server import run
    from unpoison.app._work import Work

    run(Work(case), at, ready=ready)
