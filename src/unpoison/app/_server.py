"""The web server: NiceGUI's pages, and beside them the images and columns that the pages ask for.

Images and columns are plain requests and not messages of the web socket: the browser asks for those that it
shows, and a page of 60 thumbnails does not wait for 50,000.
"""

from __future__ import annotations

import asyncio
import contextlib
import warnings
from collections.abc import AsyncIterator, Callable
from functools import lru_cache, partial
from importlib import resources
from typing import Any
from urllib.parse import quote

import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse
from nicegui import Event, ui

from unpoison.app._content import column_for, picture_for
from unpoison.app._guard import Guard
from unpoison.app._pages import Pages
from unpoison.app._serve import Listening
from unpoison.app._work import Work
from unpoison.data import encode_png
from unpoison.errors import UnpoisonError
from unpoison.report import VERDICTS, leaderboard_html

_STATIC = {"app.css": "text/css", "keys.js": "text/javascript", "upload.js": "text/javascript"}
_TICK = 0.25


def run(work: Work, at: Listening, *, ready: Callable[[str], None]) -> None:
    """Serve until the process is interrupted."""
    changed: Event[[]] = Event()
    application = FastAPI(
        lifespan=partial(_lifespan, work, changed), docs_url=None, redoc_url=None, openapi_url=None
    )
    _add_endpoints(application, work)
    Pages(work, changed).add()
    ui.run_with(
        application,
        title="unpoison",
        favicon="data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg'/>",
        tailwind=False,
        show_welcome_message=False,
        reconnect_timeout=10.0,
        gzip_middleware_factory=None,
        binding_refresh_interval=None,
    )
    guard = Guard(application, at.token, at.host)
    guard.port = at.socket.getsockname()[1]
    config = uvicorn.Config(
        guard,
        log_level="warning",
        access_log=False,  # it would hold the token
        server_header=False,
        ws_max_size=1 << 20,
        timeout_graceful_shutdown=2,
    )
    # On its start NiceGUI looks at every object of the process, some of which warn when they are looked at.
    warnings.filterwarnings("ignore", category=FutureWarning, module="nicegui")
    server = _Server(config)
    server.guard, server.ready = guard, ready
    server.run(sockets=[at.socket])


class _Server(uvicorn.Server):
    """Tells its address when it listens."""

    guard: Guard
    ready: Callable[[str], None]

    async def startup(self, sockets: Any = None) -> None:
        """Listen; then the port is known."""
        await super().startup(sockets)
        if not self.started:
            return
        shown = f"[{self.guard.host}]" if ":" in self.guard.host else self.guard.host
        self.ready(f"http://{shown}:{self.guard.port}/?token={quote(self.guard.token, safe='')}")


@contextlib.asynccontextmanager
async def _lifespan(work: Work, changed: Event[[]], _: FastAPI) -> AsyncIterator[None]:
    """Tell the windows of changes, many at a time; see what other processes decide; end the jobs."""
    news = asyncio.Event()
    loop = asyncio.get_running_loop()

    def told() -> None:
        loop.call_soon_threadsafe(news.set)

    work.changed = told

    async def tell() -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), 1.0)
            # While a job runs, its seconds are shown.
            if work.refresh() or news.is_set() or work.jobs.current:
                news.clear()
                changed.emit()
                await asyncio.sleep(_TICK if work.jobs.current else 0.02)

    tasks = [asyncio.create_task(tell()), asyncio.create_task(work.prepare())]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await work.close()


def _add_endpoints(application: FastAPI, work: Work) -> None:
    @lru_cache(maxsize=512)
    def encoded(kind: str, number: int, search: str) -> bytes | None:
        image = picture_for(work, kind, number, search)
        if image is None:
            return None
        return encode_png(image if len(image) in (1, 3) else image[:1])

    @application.exception_handler(UnpoisonError)
    def refused(_: Request, error: Exception) -> Response:
        return Response(str(error), status_code=400, media_type="text/plain")

    @application.get("/image/{kind}/{number}.png")
    def image(kind: str, number: int, search: str = "") -> Response:
        found = encoded(kind, number, search)
        if found is None:
            return Response(status_code=404)
        return Response(found, media_type="image/png", headers={"cache-control": "private, max-age=600"})

    @application.get("/column/{name}")
    def column(name: str, search: str = "") -> Response:
        found = column_for(work, name, search)
        if found is None:
            return Response(status_code=404)
        return Response(found, media_type="application/octet-stream", headers={"cache-control": "no-store"})

    @application.post("/decide/{verdict}")
    async def decide(verdict: str, request: Request) -> Response:
        """Decide about the examples whose bits are set in the body, the first example the lowest bit."""
        if verdict not in VERDICTS:
            return Response(status_code=404)
        bits = np.unpackbits(np.frombuffer(await request.body(), np.uint8), bitorder="little")
        work.decide(np.flatnonzero(bits), verdict)
        return Response(status_code=204)

    @application.post("/undo")
    def undo() -> Response:
        work.undo()
        return Response(status_code=204)

    @application.post("/redo")
    def redo() -> Response:
        work.redo()
        return Response(status_code=204)

    @application.post("/upload")
    async def upload(request: Request, name: str = "") -> Response:
        """Take in the image file in the body."""
        await work.upload(name, await request.body())
        return Response(status_code=204)

    @application.get("/leaderboard/{store}/{recipe}")
    def board(store: str, recipe: str) -> Response:
        """The page of a leaderboard, of a store beside the runs; our own, with a script named by its hash."""
        found = leaderboard_html(work.results(store, recipe))
        return Response(found, media_type="text/html", headers={"cache-control": "no-store"})

    @application.get("/static/{name}")
    def static(name: str) -> Response:
        if name not in _STATIC:
            return Response(status_code=404)
        text = resources.files("unpoison.app").joinpath(name).read_text(encoding="utf-8")
        return Response(text, media_type=_STATIC[name], headers={"cache-control": "no-cache"})

    @application.get("/file/{name}")
    def file(name: str) -> Response:
        """What a job wrote as a file, or the log of decisions."""
        written = {
            job.out.name: job.out for job in work.jobs.all if job.state == "done" and job.writes == "file"
        }
        place = {**written, work.decisions.path.name: work.decisions.path}.get(name)
        if place is None or not place.is_file():
            return Response(status_code=404)
        page = place.suffix == ".html"  # our own report, which runs no script
        return FileResponse(
            place,
            media_type="text/html" if page else "application/octet-stream",
            filename=None if page else name,
            headers={"cache-control": "no-store"},
        )
