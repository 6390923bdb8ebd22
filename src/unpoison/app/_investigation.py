"""Investigation: the verdict of a search, and its ranked examples, decided one by one with the keyboard."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import final

import numpy as np
import numpy.typing as npt
from nicegui import background_tasks, ui

from unpoison.app._content import can_compare, is_pictured, nearest_to
from unpoison.app._elements import (
    Sight,
    address,
    button,
    drawing,
    figures,
    select,
    set_attribute,
    set_class,
    set_text,
    tag,
    told_counts,
)
from unpoison.app._overview import short_verdict
from unpoison.app._searches import Search
from unpoison.app._work import Work
from unpoison.report import VERDICTS, Verdict, number, percent, plain, score_histogram, verdict
from unpoison.unlearners import names as unlearners

PAGE = 48
_SETTLED = 0.12
"""Seconds that an example is looked at before the nearest one is searched."""
_MARKS = {"undecided": "", "blame": "blamed", "clear": "cleared", "unsure": "unsure"}
_SHOWN = (
    ("all", "all, flagged first"),
    ("flagged", "flagged"),
    ("undecided", "flagged, undecided"),
    ("blame", "blamed"),
    ("clear", "cleared"),
    ("unsure", "unsure"),
)
_CHOICES: tuple[tuple[Verdict, str, str], ...] = (
    ("blame", "Blame", "b"),
    ("clear", "Clear", "c"),
    ("unsure", "Unsure", "u"),
)
_FORMS = (
    ("csv", "csv"),
    ("json", "json"),
    ("list", "list of names"),
    ("unflagged-list", "list of all others"),
    ("folder", "folder of links"),
    ("parquet", "parquet"),
    ("sarif", "SARIF"),
    ("cyclonedx", "CycloneDX"),
    ("markdown", "Markdown"),
)


@final
class Investigation:
    """The view.

    Arguments:
        work: what it shows.
        search: the name of the search; the last one when there is none of that name.
        example: the training example to begin with; the first one when negative.
    """

    def __init__(self, work: Work, search: str = "", example: int = -1) -> None:
        self.work = work
        self.search = work.search_named(search)
        self.shown = "all"
        self.order: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self.place = 0
        self.first = -1
        self.form, self.unlearner = "csv", "retrain"
        self.tiles: list[_Tile] = []
        self._compared = -1
        if self.search is None:
            tag("h1", "Investigation")
            tag("p", "There are no findings yet. Start a trace from a wrong answer.")
            tag("a", "Wrong answers", "button", href="/")
            return
        self._flagged = frozenset(self.search.data.flagged.tolist())
        self._head(self.search)
        with tag("section", aria_labelledby="compare", classes="bench"):
            tag("h2", "Example by example", id="compare")
            self._pictures()
            self.status = tag("p", "", "status-line", aria_live="polite", id="current")
            self._buttons()
        with tag("section", aria_labelledby="ranked"):
            tag("h2", "Ranked examples", id="ranked")
            with tag("div", classes="controls"):
                select("Show", _SHOWN, self.shown, self._show_only)
                with tag("span", classes="pager"):
                    button("Previous page", lambda: self._turn(-1), key="[")
                    button("Next page", lambda: self._turn(1), key="]")
                self.range = tag("p", "", "quiet")
            self.grid = tag("div", classes="grid small", role="group", aria_label="ranked examples")
        self._next_steps(self.search)
        self._evidence(self.search)
        self._filter()
        if 0 <= example < len(work.training_set):
            self._go(int(np.flatnonzero(self.order == example)[0]))
        else:
            self._go(0)

    def update(self) -> None:
        """Show what has changed: decisions, counts, new searches."""
        if self.search is None:
            if self.work.searches:
                ui.navigate.reload()
            return
        if self.shown in VERDICTS:
            self._filter(keep=True)
        self._draw()

    # --- what is shown

    def _head(self, search: Search) -> None:
        data = search.data
        if len(self.work.searches) > 1:
            options = [
                (one.name, f"{one.name}: {' '.join(one.suspects) or 'scan'}, {short_verdict(one)}")
                for one in self.work.searches
            ]
            select(
                "Search",
                options,
                search.name,
                lambda name: ui.navigate.to(address("/investigation", search=name)),
            )
        tag("h1", verdict(data))
        if data.summary:
            tag("p", plain(data.summary), "summary")
        shown = [("Flagged", f"{len(data.flagged):,}", f"of {len(data):,} training examples")]
        if data.p_value is not None and data.false_alarm_level is not None:
            below = "at most" if data.p_value <= data.false_alarm_level else "above"
            shown.append(
                ("p-value", number(data.p_value), f"{below} the level, {number(data.false_alarm_level)}")
            )
        if data.cause is not None:
            shown.append(
                ("Cause", data.cause.kind.capitalize(), f"{data.cause.examples:,} examples stand out")
            )
        cut = number(data.threshold) if np.isfinite(data.threshold) else "none"
        shown.append(("Threshold of the score", cut, plain(data.threshold_how, limit=200)))
        if data.precision is not None and data.recall is not None:
            shown.append(
                (
                    "Precision and recall",
                    f"{percent(data.precision.rate)}, {percent(data.recall.rate)}",
                    "against the known poison",
                )
            )
        figures(shown)

    def _pictures(self) -> None:
        search = self.search
        assert search is not None
        data, seen = search.data, search.findings.observation
        with tag("div", classes="pictures"):
            if seen is not None and len(seen):
                said = ""
                if data.predicted is not None:
                    said = f": answered “{data.class_name(data.predicted, limit=40)}”"
                if data.true_label is not None:
                    said += f", is “{data.class_name(data.true_label, limit=40)}”"
                with tag("figure"):
                    Sight(self.work, "suspect", search.name).show(0, "the input that was traced")
                    tag("figcaption", f"Suspect {plain(' '.join(search.suspects), limit=80)}{said}")
            with tag("figure"):
                self.example = Sight(self.work, "train", id="example")
                self.caption = tag("figcaption")
            self.difference: Sight | None = None
            if data.observation is not None and is_pictured(self.work, "train"):
                with tag("figure"):
                    self.difference = Sight(self.work, "difference", search.name)
                    tag("figcaption", "Suspect minus training example; grey is no difference")
            with tag("figure"):
                self.nearest = Sight(self.work, "train")
                self.nearest_caption = tag("figcaption")

    def _buttons(self) -> None:
        with tag("div", classes="buttons", role="group", aria_label="decisions"):
            self.choices = {
                verdict: button(text, partial(self._decide, verdict), key=key, classes=verdict)
                for verdict, text, key in _CHOICES
            }
            button("Previous", lambda: self._go(self.place - 1), key="p ArrowLeft", shown="p")
            button("Next", lambda: self._go(self.place + 1), key="n ArrowRight", shown="n")
            self.undo = button("Undo", self.work.undo, key="z")
            self.redo = button("Redo", self.work.redo, key="y")
            self.all = button("Blame all flagged", self._blame_flagged, key="B", shown="⇧b")

    def _next_steps(self, search: Search) -> None:
        with tag("section", aria_labelledby="next"):
            tag("h2", "With what is decided", id="next")
            self.counts = tag("p", "", "status-line", id="counts")
            with tag("div", classes="buttons"):
                select(
                    "Heal by",
                    [(one, one) for one in unlearners()],
                    self.unlearner,
                    lambda value: setattr(self, "unlearner", value),
                )
                self.heal = button("Heal without the blamed", self._heal, key="h")
                forms = [one for one in _FORMS if one[0] != "folder" or self.work.can_link]
                select("Quarantine as", forms, self.form, lambda value: setattr(self, "form", value))
                self.export = button("Export the blamed", self._export, key="e")
                if search.is_run:
                    button("Write the report", lambda: self.work.report(search), key="r")
            self.results = tag("ul", classes="results")

    def _evidence(self, search: Search) -> None:
        with tag("section", aria_labelledby="scores"):
            tag("h2", "Scores", id="scores")
            figure = score_histogram(search.data)
            drawing(str(figure.svg), figure.caption)

    def _filter(self, keep: bool = False) -> None:
        search = self.search
        assert search is not None
        current = int(self.order[self.place]) if keep and len(self.order) else -1
        codes = self.work.decisions.codes
        order = search.order
        if self.shown in ("flagged", "undecided"):
            order = order[: len(search.data.flagged)]
        if self.shown == "undecided":
            order = order[codes[order] == 0]
        elif self.shown in VERDICTS:
            order = order[codes[order] == VERDICTS.index(self.shown)]
        if keep and np.array_equal(order, self.order):
            return
        self.order, self.first = order, -1
        found = np.flatnonzero(order == current)
        self.place = int(found[0]) if len(found) else min(self.place, max(0, len(order) - 1))

    def _draw(self) -> None:
        """Bring everything up to date with the present example and the decisions."""
        first = self.place // PAGE * PAGE
        if first != self.first:
            self.first = first
            self.grid.clear()
            rows = self.order[first : first + PAGE]
            with self.grid:
                self.tiles = [_Tile(self, first + offset, int(index)) for offset, index in enumerate(rows)]
        end = min(first + PAGE, len(self.order))
        set_text(
            self.range, f"{first + 1:,} to {end:,} of {len(self.order):,}" if len(self.order) else "none"
        )
        for one in self.tiles:
            one.update()
        self._draw_current()
        decisions = self.work.decisions
        counts = decisions.counts()
        set_text(self.counts, told_counts(counts))
        for element, on in (
            (self.undo, decisions.can_undo),
            (self.redo, decisions.can_redo),
            (self.heal, counts["blame"] and self.work.can_ask),
            (self.export, counts["blame"]),
        ):
            set_attribute(element, "aria-disabled", None if on else "true")
        self._draw_results()

    def _draw_current(self) -> None:
        search = self.search
        assert search is not None
        if not len(self.order):
            set_text(self.status, "No example is shown.")
            return
        index = int(self.order[self.place])
        verdict, data = self.work.decisions.verdict_of(index), search.data
        flagged = "flagged" if index in self._flagged else "not flagged"
        label = self.work.class_name(int(data.labels[index]))
        said = _MARKS[verdict] or "undecided"
        name, score = self.work.name_of(index), number(float(data.scores[index]))
        rank = f"{self.place + 1:,} of {len(self.order):,}"
        set_text(self.status, f"{rank}: example {name}, label “{label}”, score {score}, {flagged}, {said}")
        for choice, element in self.choices.items():
            set_attribute(element, "aria-pressed", "true" if choice == verdict else "false")
        if index == self._compared:
            return
        self._compared = index
        self.example.show(index, f"training example {name}")
        set_text(self.caption, f"Training example {name}: labelled “{label}”")
        if self.difference is not None:
            self.difference.show(index, "suspect minus training example")
        background_tasks.create(self._show_nearest(index))

    async def _show_nearest(self, index: int) -> None:
        search = self.search
        assert search is not None
        await asyncio.sleep(_SETTLED)
        if index != self._compared:
            return  # gone through quickly
        found = await asyncio.to_thread(nearest_to, self.work, index, search.name)
        if index != self._compared:
            return
        if found is None:
            waits = self.work.can_ask and not can_compare(self.work)
            told = "The nearest example is known when the map has been made"
            set_text(self.nearest_caption, told if waits else "No other example to compare with")
            return
        nearest, by = found
        label, name = self.work.class_name(int(search.data.labels[nearest])), self.work.name_of(nearest)
        self.nearest.show(nearest, f"training example {name}")
        set_text(
            self.nearest_caption,
            f"Nearest by {by}, neither flagged nor blamed: {name}, labelled “{label}”",
        )

    def _draw_results(self) -> None:
        jobs = [job for job in self.work.jobs.all if job.words[0] in ("heal", "export", "report")]
        known = [(job.number, job.state) for job in jobs]
        if known == getattr(self, "_known_jobs", None):
            return
        self._known_jobs = known
        self.results.clear()
        with self.results:
            for job in reversed(jobs):
                with tag("li"):
                    tag("span", f"{job.title}: {job.state}. ")
                    if job.state == "done" and job.writes == "folder":
                        tag("span", f"{job.out}")
                    elif job.state == "done" and job.writes == "file":
                        tag(
                            "a",
                            f"{job.out}",
                            href=f"/file/{job.out.name}",
                            target="_blank" if job.out.suffix == ".html" else None,
                        )
                    elif job.state == "done":
                        tag("a", "Compare before and after", href="/compare")
                    elif job.message:
                        tag("span", plain(job.message, limit=300), "quiet")

    # --- what is done

    def _go(self, place: int) -> None:
        if not len(self.order):
            self._draw()
            return
        self.place = min(max(place, 0), len(self.order) - 1)
        self._draw()
        index = int(self.order[self.place])
        search = self.search
        assert search is not None
        # A page that is loaded again goes on from here.
        here = json.dumps(address("/investigation", search=search.name, example=index))
        ui.run_javascript(f"history.replaceState(null, '', {here})")

    def _decide(self, verdict: Verdict) -> None:
        if not len(self.order):
            return
        place, index = self.place, int(self.order[self.place])
        before = len(self.order)
        self.work.decide([index], verdict)
        self._filter(keep=True)
        # In a list that the example has just left, the next one is at its place already.
        self._go(place + (len(self.order) == before) if self.shown != "all" else place + 1)

    def _blame_flagged(self) -> None:
        assert self.search is not None
        flagged = self.search.data.flagged
        undecided = flagged[self.work.decisions.codes[flagged] == 0]
        if len(undecided):
            self.work.decide(undecided, "blame")

    def _show_only(self, which: str) -> None:
        self.shown, self.place = which, 0
        self._filter()
        self._go(0)

    def _turn(self, by: int) -> None:
        self._go((self.place // PAGE + by) * PAGE)

    def _heal(self) -> None:
        self.work.heal(self.unlearner, self.search)

    def _export(self) -> None:
        self.work.export(self.form, self.search)


@final
class _Tile:
    """A ranked example; pressing it makes it the present one."""

    def __init__(self, view: Investigation, place: int, index: int) -> None:
        self.view, self.place, self.index = view, place, index
        search = view.search
        assert search is not None
        work, data = view.work, search.data
        label, score = work.class_name(int(data.labels[index])), number(float(data.scores[index]))
        name = work.name_of(index)
        with tag("button", classes="tile", type="button", title=f"example {name}") as self.box:
            Sight(work, "train").show(index, f"training example {name}")
            tag("span", label, "names")
            flagged = " flagged" if place < len(data.flagged) and view.shown in ("all", "flagged") else ""
            tag("span", f"score {score}{flagged}", "quiet")
            self.mark = tag("span", "", "mark")
        self.box.on("click", lambda: view._go(self.place))

    def update(self) -> None:
        """Show the decision, and whether it is the present one."""
        verdict = self.view.work.decisions.verdict_of(self.index)
        for one in VERDICTS[1:]:
            set_class(self.box, one, one == verdict)
        set_text(self.mark, _MARKS[verdict])
        set_attribute(self.box, "aria-current", "true" if self.place == self.view.place else None)
