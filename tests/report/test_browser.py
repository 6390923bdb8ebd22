"""The page in a real browser: nothing is fetched, no text of the data is executed, and the page is drawn."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chromium import BROWSER, FLAGS, MARKS
from unpoison.report import ReportData, render

pytestmark = MARKS


class Elements(HTMLParser):
    """The elements of the page in the browser."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))


def browse(folder: Path, address: str, *wanted: str) -> str:
    assert BROWSER is not None
    command = [
        BROWSER,
        "--headless",
        *FLAGS,
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}",
        *wanted,
        address,
    ]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    return done.stdout.decode("utf-8")


class Server(HTTPServer):
    """Serves one page and records all requests."""

    page: bytes
    requests: list[str]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(self.server.page)))
        self.end_headers()
        self.wfile.write(self.server.page)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[[str], Server]]:
    running: list[tuple[Server, threading.Thread]] = []

    def start(page: str) -> Server:
        server = Server(("127.0.0.1", 0), Handler)
        server.page, server.requests = page.encode(), []
        thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.05), daemon=True)
        thread.start()
        running.append((server, thread))
        return server

    yield start
    for server, thread in running:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_page_requests_nothing_and_executes_nothing(
    make_data: Callable[..., ReportData], tmp_path: Path, serve: Callable[[str], Server]
) -> None:
    mark = "document.title='owned'"
    names = (
        f"<script>{mark}</script>",
        f'"><img src=/stolen onerror="{mark}">',
        f"</style></svg><svg onload={mark}>",
        "שלום",
        '<link rel=stylesheet href=/stolen><style>@import "/stolen"</style>',
    )
    data = make_data(500, poisons=10, names=names, draws=10)
    page = render(replace(data, summary=f"</p><script>{mark}</script>"))
    server = serve(page)
    dom = browse(
        tmp_path, f"http://127.0.0.1:{server.server_port}/", "--dump-dom", "--virtual-time-budget=5000"
    )
    assert server.requests == ["/"]
    assert "<title>owned" not in dom
    found = Elements()
    found.feed(dom)
    assert not {"script", "iframe", "object"} & {tag for tag, _ in found.elements}
    addresses = [a[name] for _, a in found.elements for name in ("src", "href") if name in a]
    assert len(addresses) > 70
    assert all(address and address.startswith(("data:", "#")) for address in addresses)
    assert dom.count('role="img"') == 5
    assert "Poison found: 12 of 500 training examples" in dom
    assert "98.0 % → 1.0 %" in dom


def test_the_policy_holds_where_the_escaping_fails(
    make_data: Callable[..., ReportData], tmp_path: Path, serve: Callable[[str], Server]
) -> None:
    page = render(make_data(300, poisons=10))
    hostile = (
        "<script>document.title='owned'</script><img src=/stolen onerror=\"document.title='owned'\">"
        "<link rel=stylesheet href=/stolen><style>body { display: none }</style><iframe src=/stolen></iframe>"
    )
    server = serve(page.replace("<main>", f"<main>{hostile}"))
    dom = browse(
        tmp_path, f"http://127.0.0.1:{server.server_port}/", "--dump-dom", "--virtual-time-budget=5000"
    )
    assert "/stolen" in dom
    assert server.requests == ["/"]
    assert "<title>owned" not in dom


@pytest.mark.parametrize("width", [500, 1280])
def test_the_page_is_drawn(make_data: Callable[..., ReportData], tmp_path: Path, width: int) -> None:
    (tmp_path / "report.html").write_text(render(make_data(2_000, poisons=40)), encoding="utf-8")
    browse(
        tmp_path,
        (tmp_path / "report.html").as_uri(),
        f"--screenshot={tmp_path / 'shot.png'}",
        f"--window-size={width},6000",
    )
    pixels = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB")).astype(int)
    assert pixels.shape[1] == width
    white = (pixels == 255).all(axis=2)
    assert 0.5 < white.mean() < 0.98
    # The page keeps its margin: nothing runs out of it to the right.
    assert white[:, -10:].all()
    # The style sheet was admitted: the dark red of poison marks and hatching is there.
    assert ((pixels - [0x8F, 0x1D, 0x14]) == 0).all(axis=2).sum() > 200
    # Every band of the page holds ink, down to the footer.
    rows = np.flatnonzero((~white).any(axis=1))
    assert rows.max() > 3_000
    assert np.diff(rows).max() < 200
