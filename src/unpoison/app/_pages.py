"""The frame of every page: navigation, what is being done, and the address of each view."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, final

from nicegui import Event, ui

from unpoison.app._compare import Compare
from unpoison.app._elements import alert, button, set_attribute, set_class, set_text, tag
from unpoison.app._investigation import Investigation
from unpoison.app._log import Log
from unpoison.app._map import Map
from unpoison.app._overview import Overview
from unpoison.app._runs import Runs
from unpoison.app._work import Work
from unpoison.errors import UnpoisonError
from unpoison.report import duration, plain

_VIEWS = {
    "/": ("Overview", "1"),
    "/investigation": ("Investigation", "2"),
    "/map": ("Map", "3"),
    "/compare": ("Before and after", "4"),
    "/runs": ("Runs", "5"),
    "/log": ("Log", "6"),
}


@final
class Pages:
    """All pages of one server.

    Arguments:
        work: what they show.
        changed: is told after each change of it.
    """

    def __init__(self, work: Work, changed: Event[[]]) -> None:
        self.work, self.changed = work, changed

    def add(self) -> None:
        """Give each view its address."""
        for path, view in (("/", Overview), ("/compare", Compare), ("/runs", Runs), ("/log", Log)):
            ui.page(path)(self._plain(path, view))

        @ui.page("/investigation")
        def investigation(search: str = "", example: int = -1) -> None:
            with self._frame("/investigation"):
                self._keep(Investigation(self.work, search, example))

        @ui.page("/map")
        def plane(search: str = "") -> None:
            with self._frame("/map"):
                self._keep(Map(self.work, search))

    def _plain(self, path: str, view: Any) -> Any:
        def page() -> None:
            with self._frame(path):
                self._keep(view(self.work))

        return page

    def _keep(self, view: Any) -> None:
        """Show a view, and show it anew after changes."""
        self.changed.subscribe(view.update)

    @contextlib.contextmanager
    def _frame(self, here: str) -> Iterator[None]:
        ui.add_head_html(
            '<link rel="stylesheet" href="/static/app.css">'
            '<script src="/static/keys.js" defer></script><script src="/static/upload.js" defer></script>'
        )
        ui.page_title(f"{_VIEWS[here][0]} – unpoison")
        tag("a", "Skip to the content", "skip", href="#content")
        with tag("header", classes="bar"):
            tag("span", "unpoison", "brand")
            with tag("nav", aria_label="Views"):
                for path, (name, key) in _VIEWS.items():
                    current = "page" if path == here else None
                    with tag("a", href=path, aria_current=current, aria_keyshortcuts=key):
                        tag("span", name)
                        tag("kbd", key, aria_hidden="true")
            _Status(self.work, self.changed)
        with tag("div", classes="view", id="content", tabindex="-1"):
            alert()
            try:
                yield
            except UnpoisonError as error:
                tag("p", str(error), "trouble", role="alert")
        with tag("footer"):
            tag(
                "p",
                f"{plain(self.work.training_set.name, limit=80)}, {len(self.work.training_set):,} training "
                f"examples. Decisions are kept in {self.work.decisions.path}.",
            )


@final
class _Status:
    """The job that runs, with its progress and a button that ends it."""

    def __init__(self, work: Work, changed: Event[[]]) -> None:
        self.work = work
        with tag("div", classes="status", role="status") as self.box:
            self.text = tag("span")
            self.bar = tag("progress", max=1, aria_label="progress of the present stage")
            self.cancel = button("Cancel", self._cancel, classes="small", id="cancel")
        self.trouble = tag("p", "", "trouble wide-line", role="alert", id="trouble")
        changed.subscribe(self.update)
        self.update()

    def _cancel(self) -> None:
        if (job := self.work.jobs.current) is not None:
            self.work.jobs.cancel(job)

    def update(self) -> None:
        """Show how far the job is, and what is wrong with the server's work."""
        set_text(self.trouble, self.work.trouble)
        job = self.work.jobs.current
        set_class(self.box, "idle", job is None)
        if job is None:
            last = self.work.jobs.all[-1] if self.work.jobs.all else None
            said = "" if last is None else f"{last.title}: {last.state}"
            set_text(
                self.text,
                f"{said} – {plain(last.message, limit=160)}" if last and last.state == "failed" else said,
            )
            return
        waiting = sum(one.state == "waiting" for one in self.work.jobs.all)
        more = f"; {waiting} waiting" if waiting else ""
        count = f", {job.done:,} of {job.total:,}" if job.total else ""
        set_text(
            self.text,
            f"{job.title}: {plain(job.stage) or 'starting'}{count}, {duration(round(job.seconds))}{more}",
        )
        set_attribute(self.bar, "value", None if job.share is None else round(job.share, 3))
