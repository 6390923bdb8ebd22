"""Who is let in: the token, the cookie, other sites, other names for this machine, and large requests."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

from unpoison.app._guard import LARGEST_BODY, Guard, is_loopback
from unpoison.app._serve import check_address
from unpoison.errors import InputError

TOKEN = "a-token-that-is-long-enough"
HERE = "127.0.0.1:8123"


async def application(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-frame-options", b"no")]})
    await send({"type": "http.response.body", "body": b"secret"})


def guard(host: str = "127.0.0.1") -> Guard:
    made = Guard(application, TOKEN, host)
    made.port = 8123
    return made


def ask(
    guarded: Guard,
    path: str = "/",
    query: str = "",
    *,
    kind: str = "http",
    method: str = "GET",
    **headers: str,
) -> list[Any]:
    sent: list[Any] = []
    given = {"host": HERE, **{name.replace("_", "-"): value for name, value in headers.items()}}
    scope = {
        "type": kind,
        "method": method,
        "path": path,
        "query_string": query.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
    }

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(guarded(scope, receive, send))
    return sent


def header(sent: list[Any], name: str) -> str:
    return next((value.decode() for key, value in sent[0]["headers"] if key.decode() == name), "")


def cookie_of(guarded: Guard) -> str:
    sent = ask(guarded, query=f"token={TOKEN}")
    found = header(sent, "set-cookie")
    assert re.fullmatch(r"unpoison_8123=[\w-]{40,}; Path=/; HttpOnly; SameSite=Strict", found)
    return found.partition(";")[0]


def refused(sent: list[Any], kind: str = "http") -> bool:
    if kind == "websocket":
        return [message["type"] for message in sent] == ["websocket.close"]
    secret = any(b"secret" in message.get("body", b"") for message in sent)
    return sent[0]["status"] == 403 and not secret and not header(sent, "set-cookie")


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_nothing_without_the_cookie(kind: str) -> None:
    guarded = guard()
    own = {"origin": f"http://{HERE}"}
    for path in ("/", "/image/train/0.png", "/static/app.css", "/_nicegui_ws/socket.io/", "/no/such/page"):
        assert refused(ask(guarded, path, kind=kind, **own), kind)
        assert refused(ask(guarded, path, "token=wrong", kind=kind, **own), kind)
        assert refused(ask(guarded, path, kind=kind, cookie="unpoison_8123=wrong", **own), kind)
        assert refused(ask(guarded, path, kind=kind, cookie=f"unpoison_8123={TOKEN}", **own), kind)
    # The token opens the first page alone, and only for what a person does who opens an address.
    assert refused(ask(guarded, "/map", f"token={TOKEN}"))
    assert refused(ask(guarded, "/", f"token={TOKEN}", method="POST", **own))


def test_the_token_is_exchanged_for_a_cookie_that_opens_everything() -> None:
    guarded = guard()
    cookie = cookie_of(guarded)
    assert TOKEN not in cookie
    for path in ("/", "/image/train/0.png", "/static/app.css"):
        sent = ask(guarded, path, cookie=f"other=1; {cookie}")
        assert sent[0]["status"] == 200
        assert "default-src 'none'" in header(sent, "content-security-policy")
        assert header(sent, "referrer-policy") == "no-referrer"
    own = {"origin": f"http://{HERE}", "cookie": cookie}
    assert ask(guarded, kind="websocket", **own) == [{"type": "websocket.accept"}]
    assert ask(guarded, "/decide/blame", method="POST", **own)[0]["status"] == 200
    large = str(LARGEST_BODY + 1)
    assert ask(guarded, "/decide/blame", method="POST", content_length=large, **own)[0]["status"] == 413
    # Another server's cookie opens nothing.
    assert refused(ask(guard(), cookie=cookie))


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_another_site_gets_nothing_with_the_cookie(kind: str) -> None:
    guarded = guard()
    cookie = cookie_of(guarded)
    for origin in (
        "http://evil.example",
        "null",
        "http://127.0.0.1:9999",
        f"https://{HERE}",
        "http://localhost:8123",
    ):
        assert refused(ask(guarded, kind=kind, method="POST", cookie=cookie, origin=origin), kind)
    # What changes something, and every web socket, says where it comes from.
    assert refused(ask(guarded, kind=kind, method="POST", cookie=cookie), kind)
    # A name that its owner points to this machine.
    for host in (
        "evil.example:8123",
        "evil.example",
        "127.0.0.1",
        "127.0.0.1:80",
        "127.0.0.1.evil.example:8123",
        "",
    ):
        sent = ask(guarded, kind=kind, cookie=cookie, origin=f"http://{host}", host=host)
        assert refused(sent, kind)
        assert refused(ask(guarded, query=f"token={TOKEN}", host=host))


def test_the_names_of_this_machine() -> None:
    local, open_to_all = guard(), guard("0.0.0.0")
    for name in ("127.0.0.1", "localhost", "[::1]", "LOCALHOST"):
        assert ask(local, query=f"token={TOKEN}", host=f"{name}:8123")[0]["status"] == 200
    assert refused(ask(local, query=f"token={TOKEN}", host="192.168.0.7:8123"))
    assert ask(open_to_all, query=f"token={TOKEN}", host="192.168.0.7:8123")[0]["status"] == 200
    assert refused(ask(open_to_all, query=f"token={TOKEN}", host="evil.example:8123"))
    # The port of http goes without saying.
    plain = guard()
    plain.port = 80
    for host in ("127.0.0.1", "localhost", "[::1]", "127.0.0.1:80"):
        assert ask(plain, query=f"token={TOKEN}", host=host)[0]["status"] == 200
    for host in ("127.0.0.1:8123", "evil.example", "[::1", "127.0.0.1:x"):
        assert refused(ask(plain, query=f"token={TOKEN}", host=host))
    # Browsers write names in small letters.
    assert ask(guard("Box.Example"), query=f"token={TOKEN}", host="box.example:8123")[0]["status"] == 200


def test_an_address_that_others_reach_needs_a_token() -> None:
    assert [is_loopback(host) for host in ("127.0.0.2", "::1", "LocalHost")] == [True] * 3
    check_address("127.0.0.1", None)
    check_address("0.0.0.0", TOKEN)
    for host in ("0.0.0.0", "::", "192.168.0.7", "example.org"):
        with pytest.raises(InputError, match="give a --token"):
            check_address(host, None)
    for token in ("", "short", "ä" * 20, "a" * 20 + "\n"):
        with pytest.raises(InputError, match="16 or more"):
            check_address("127.0.0.1", token)
