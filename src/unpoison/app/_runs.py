"""Runs: the searches that are worked on, the run directories beside them, and leaderboards of stores."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any, final
from urllib.parse import quote

from nicegui import background_tasks

from unpoison.app._elements import address, button, select, table, tag, tell
from unpoison.app._overview import short_verdict
from unpoison.app._searches import Beside
from unpoison.app._work import Work
from unpoison.errors import UnpoisonError
from unpoison.evaluation import leaderboard
from unpoison.report import Table, plain, table_of

_COLUMNS = (
    "Method",
    "Attack",
    "Attack success",
    "Clean accuracy",
    "Poison found",
    "Recall",
    "Precision",
    "Trials",
)
_READABLE = ("trace", "scan", "heal", "repair", "demo")


@final
class Runs:
    """The view of the searches of `work`, and of what lies beside them."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self._shown = -1
        tag("h1", "Runs")
        with tag("section", aria_labelledby="searches"):
            tag("h2", "Searches of this training set", id="searches")
            self.searches = tag("div")
        with tag("section", aria_labelledby="beside"):
            tag("h2", "Run directories beside", id="beside")
            self.beside = tag("div")
            with self.beside:
                tag("p", "The directory is being read ...", "quiet")
        with tag("section", aria_labelledby="boards"):
            tag("h2", "Leaderboards", id="boards")
            self.choice = tag("div", classes="controls")
            self.board = tag("div")
        self.update()
        background_tasks.create(self._read())

    def update(self) -> None:
        """Show what has changed."""
        if self._shown == len(self.work.searches):
            return
        self._shown = len(self.work.searches)
        self.searches.clear()
        with self.searches:
            if not self.work.searches:
                tag("p", "There are no findings yet. Start a trace from a wrong answer.", "quiet")
                return
            table(
                ("Run", "Input", "Method", "Verdict", "Flagged"),
                [
                    (
                        one.name,
                        plain(" ".join(one.suspects), limit=80) or "–",
                        one.data.method,
                        short_verdict(one),
                        f"{len(one.data.flagged):,}",
                    )
                    for one in self.work.searches
                ],
                [address("/investigation", search=one.name) for one in self.work.searches],
            )

    async def _read(self) -> None:
        found = await self._relist()
        boards = [(one.folder.name, name) for one in found for name in one.recipes]
        with self.choice:
            if not boards:
                tag("p", "No store of unpoison bench lies beside the opened runs.", "quiet")
                return
            options = [(str(place), f"{recipe} in {store}") for place, (store, recipe) in enumerate(boards)]
            select("Leaderboard", options, "0", lambda value: self._show(*boards[int(value)]))
        await self._draw(*boards[0])

    async def _relist(self) -> list[Beside]:
        found = await asyncio.to_thread(self.work.beside)
        self.beside.clear()
        with self.beside:
            self._list([one for one in found if not one.recipes])
        return found

    def _list(self, runs: list[Beside]) -> None:
        if not runs:
            tag("p", "There are none.", "quiet")
            return
        with tag("div", classes="wide"), tag("table", classes="numbers left"):
            with tag("thead"), tag("tr"):
                for text in ("Directory", "Verb", "Started (UTC)", "Result", ""):
                    tag("th", text, scope="col")
            with tag("tbody"):
                for one in runs:
                    with tag("tr"):
                        tag("th", plain(one.folder.name, limit=80), scope="row")
                        tag("td", one.verb)
                        tag("td", one.started[:19].replace("T", " ").removesuffix("Z"), "moment")
                        tag("td", plain(one.told, limit=200))
                        with tag("td"):
                            if self.work.has(one.folder):
                                tag("span", "opened", "quiet")
                            elif one.verb in _READABLE:
                                button(
                                    "Open", partial(self._open, one), classes="small", title=one.folder.name
                                )

    def _open(self, one: Beside) -> None:
        self.work.add(one.folder)
        self.work.changed()
        background_tasks.create(self._relist())

    def _show(self, store: str, recipe: str) -> None:
        background_tasks.create(self._draw(store, recipe))

    async def _draw(self, store: str, recipe: str) -> None:
        def made() -> tuple[Table, int, int]:
            results = self.work.results(store, recipe)
            lines = leaderboard(results)
            return table_of(lines).select(*_COLUMNS).without_empty(), len(results.table), results.planned

        told: Any = None
        try:
            told = await asyncio.to_thread(made)
        except UnpoisonError as error:
            with self.board:
                tell(str(error))
        self.board.clear()
        if told is None:
            return
        shown, done, planned = told
        with self.board:
            tag("p", f"{done:,} of {planned:,} trials are done.", "quiet")
            with tag("div", classes="wide"), tag("table", classes="numbers left"):
                with tag("thead"), tag("tr"):
                    for column in shown.columns:
                        tag("th", column.name, scope="col", title=column.meaning)
                with tag("tbody"):
                    for row in shown.rows:
                        with tag("tr"):
                            for place, cell in enumerate(row):
                                with tag("td" if place else "th", cell.text, scope=None if place else "row"):
                                    if cell.note:
                                        tag("span", cell.note, "cell-note")
            tag(
                "a",
                "All columns, plots and trials",
                "button",
                href=f"/leaderboard/{quote(store, safe='')}/{quote(recipe, safe='')}",
            )
