"""`Guard`: who is let in. It stands before everything: pages, images, static files and the web socket.

A browser shows the token once, in the address that the command prints, and gets a cookie for it that scripts
cannot read and that no other site can make the browser send. Every later request needs the cookie. What does
not have it is told 403, whatever it asks for.

A page of another site could still make the browser connect to this machine: under a name of its own that it
points here (DNS rebinding), or to a web socket, which no same-origin policy covers. So the `Host` of a
request must be an address of this server, and an `Origin`, which web sockets and forms always carry, must be
the same.
"""

from __future__ import annotations

import ipaddress
import platform
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, final
from urllib.parse import parse_qs, urlsplit

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

LARGEST_BODY = 16 << 20
"""Bytes; a selection of 100 million examples."""
_REFUSED = b"403: open the address that `unpoison app` printed, with its token\n"
# The page that takes the token moves on by itself: a redirect in answer to a link on another site would not
# carry the cookie, which is for requests of this site alone.
_ENTER = (
    b'<!doctype html><html lang="en"><meta charset="utf-8"><title>unpoison</title>'
    b'<meta http-equiv="refresh" content="0;url=/"><p><a href="/">Go on to the page</a></p></html>'
)
# Vue compiles the templates of components in the browser, which needs 'unsafe-eval'. Nothing that is not from
# this server is loaded or sent to, also where the escaping should fail.
_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address.

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, True, False)
    """
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@final
class Guard:
    """Lets requests through to an application that show the cookie, and gives the cookie for the token.

    Arguments:
        application: what is guarded, by ASGI.
        token: what the address must hold as `?token=`.
        host: the address that is listened on.
    """

    def __init__(self, application: Application, token: str, host: str) -> None:
        self.application, self.token, self.host = application, token, host.lower()
        self.port = 0
        self._session = secrets.token_urlsafe(32)

    @property
    def cookie(self) -> str:
        """The name of the cookie; cookies do not tell ports apart, so that the name does."""
        return f"unpoison_{self.port}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection."""
        if scope["type"] == "lifespan":
            await self.application(scope, receive, send)
            return
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        if not self._same_site(scope, headers):
            await _refuse(scope, receive, send)
        elif scope["type"] == "http" and scope["method"] == "GET" and self._has_token(scope):
            cookie = f"{self.cookie}={self._session}; Path=/; HttpOnly; SameSite=Strict"
            more = {"content-type": "text/html; charset=utf-8", "set-cookie": cookie}
            await _answer(send, 200, _ENTER, {**_HEADERS, **more, "cache-control": "no-store"})
        elif not self._has_cookie(headers):
            await _refuse(scope, receive, send)
        elif int(headers.get("content-length") or 0) > LARGEST_BODY:
            await _answer(send, 413, b"413: is larger than 16 MiB\n", {"content-type": "text/plain"})
        else:
            await self.application(scope, _limited(receive), _with_headers(send))

    def _same_site(self, scope: Scope, headers: dict[str, str]) -> bool:
        host = headers.get("host", "")
        try:
            parts = urlsplit(f"//{host}")
            name, port = parts.hostname or "", parts.port or 80  # which browsers leave out
        except ValueError:
            return False
        if port != self.port or not self._is_here(name):
            return False
        origin = headers.get("origin")
        if origin is None:  # sent with every web socket and every request that is not a plain GET
            return scope["type"] == "http" and scope["method"] in ("GET", "HEAD")
        return origin == f"http://{host}"

    def _is_here(self, name: str) -> bool:
        if is_loopback(name) or name == self.host:
            return True
        if is_loopback(self.host):
            return False
        # Reached from other machines: by a number, or by this machine's name, which no other site can have.
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in (platform.node().lower(), platform.node().lower().partition(".")[0])
        return True

    def _has_cookie(self, headers: dict[str, str]) -> bool:
        pairs = (part.strip().partition("=") for part in headers.get("cookie", "").split(";"))
        found = [value for name, _, value in pairs if name == self.cookie]
        return any(secrets.compare_digest(value.encode(), self._session.encode()) for value in found)

    def _has_token(self, scope: Scope) -> bool:
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        return scope["path"] == "/" and secrets.compare_digest(given.encode(), self.token.encode())


def _limited(receive: Receive) -> Receive:
    """Ends a body that does not say how large it is, and is too large."""
    read = 0

    async def counting() -> Message:
        nonlocal read
        message = await receive()
        read += len(message.get("body") or b"")
        return message if read <= LARGEST_BODY else {"type": "http.disconnect"}

    return counting


def _with_headers(send: Send) -> Send:
    async def adding(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = {name.encode() for name in _HEADERS}
            kept = [pair for pair in message.get("headers", ()) if pair[0].lower() not in own]
            message["headers"] = [*kept, *_raw(_HEADERS)]
        await send(message)

    return adding


def _raw(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008})  # before it is accepted: the browser gets a 403
        return
    await _answer(
        send, 403, _REFUSED, {"content-type": "text/plain; charset=utf-8", "cache-control": "no-store"}
    )


async def _answer(send: Send, status: int, body: bytes, headers: dict[str, str]) -> None:
    sized = {**headers, "content-length": str(len(body))}
    await send({"type": "http.response.start", "status": status, "headers": _raw(sized)})
    await send({"type": "http.response.body", "body": body})
