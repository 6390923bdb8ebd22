"""Map: the training examples by what the model makes of them, to select groups on and decide about them."""

from __future__ import annotations

from typing import Any, final

from nicegui.element import Element

from unpoison.app._elements import Sight, address, button, select, set_attribute, set_text, tag, told_counts
from unpoison.app._work import Work

_COLOURS = (("label", "label"), ("score", "score"), ("decision", "decision"))


@final
class Canvas(Element, component="map.js"):  # type: ignore[call-arg]
    """The canvas, with the script that draws it."""


@final
class Map:
    """The view.

    Arguments:
        work: what it shows.
        search: the name of the search whose scores colour the map.
    """

    def __init__(self, work: Work, search: str = "") -> None:
        self.work = work
        found = work.search_named(search)
        self.search = "" if found is None else found.name
        self._loaded = work.features.rows is not None
        work.lay_out()
        self._known = -1
        tag("h1", "Map of the training examples")
        made_of = "the features before the last layer of the model"
        if work.case.index is not None:
            made_of = "its gradient, as the index has it"
        tag(
            "p",
            f"Each point is a training example: {made_of}, on the two directions of largest variance. "
            "Examples that lie together are alike for the model.",
            "summary",
        )
        if not work.can_ask:
            tag("p", "The map is made of the model and its data, and only findings are known.", "trouble")
            return
        with tag("div", classes="controls"):
            colours = _COLOURS if self.search else (_COLOURS[0], _COLOURS[2])
            select("Colour by", colours, "label", self._colour)
            self.tool = button("Lasso", self._switch, key="l", aria_pressed="true")
            # These act in the window alone, so that keys that follow each other quickly keep their order.
            button("Select what is in view", key="v", script="() => map.visible()")
            button("Zoom in", key="+", script="() => map.zoom(1.25)")
            button("Zoom out", key="-", script="() => map.zoom(0.8)")
            button("Show all", key="0", script="() => map.all()")
        self.canvas = Canvas()
        self.canvas.props.update(
            {
                "count": len(work.training_set),
                "colour": "label",
                "search": self.search,
                "lasso": True,
                "names": [work.class_name(label) for label in range(len(work.names))],
                "label": "Map of the training examples. Arrow keys move it, plus and minus zoom, 0 shows "
                "all, v selects what is in view, Escape selects nothing.",
            }
        )
        self.canvas.on("selected", lambda event: self._selected(event.args))
        self.waiting = tag("p", "", "quiet")
        self.legend = tag("ul", classes="legend")
        with tag("div", classes="buttons", role="group", aria_label="decisions about the selection"):
            # They are never disabled: a key that is pressed right after the lasso counts.
            for verdict, text, key in (
                ("blame", "Blame selection", "b"),
                ("clear", "Clear selection", "c"),
                ("unsure", "Unsure", "u"),
                ("undecided", "Undecided", "d"),
            ):
                button(text, key=key, classes=verdict, script=f"() => map.decide('{verdict}')")
            self.undo = button("Undo", key="z", script="() => map.ask('/undo')")
            self.redo = button("Redo", key="y", script="() => map.ask('/redo')")
        self.counts = tag("p", "", "status-line", id="counts", aria_live="polite")
        self.shown = tag("div", classes="grid small", role="group", aria_label="the first selected examples")
        self._legend("label")
        self.update()

    def update(self) -> None:
        """Show what has changed: the map that was not ready, decisions."""
        if not self.work.can_ask:
            return
        if not self._loaded and self.work.features.rows is not None:
            self._loaded = True
            self.canvas.run_method("load")
        done, total = self.work.features.progress
        waits = (
            "" if self._loaded or not self.work.can_ask else f"{done:,} of {total:,} examples are read ..."
        )
        set_text(self.waiting, waits)
        decisions = self.work.decisions
        if self._known != len(decisions.audit):
            if self._known >= 0:
                self.canvas.run_method("decided")
            self._known = len(decisions.audit)
        counts = decisions.counts()
        set_text(self.counts, told_counts(counts))
        set_attribute(self.undo, "aria-disabled", None if decisions.can_undo else "true")
        set_attribute(self.redo, "aria-disabled", None if decisions.can_redo else "true")

    def _colour(self, value: str) -> None:
        self.canvas.props["colour"] = value
        self._legend(value)

    def _switch(self) -> None:
        lasso = not self.canvas.props["lasso"]
        self.canvas.props["lasso"] = lasso
        set_attribute(self.tool, "aria-pressed", "true" if lasso else "false")

    def _legend(self, colour: str) -> None:
        self.legend.clear()
        with self.legend:
            if colour == "label":
                for label in range(min(len(self.work.names), 10)):
                    tag("li", self.work.class_name(label), f"colour-{label}")
                if len(self.work.names) > 10:
                    tag("li", "and so on: later classes take the colours again")
            elif colour == "score":
                tag("li", "half of the examples or less", "score-low")
                tag("li", "the highest scores", "score-high")
            else:
                for name, words in (
                    ("undecided", "undecided"),
                    ("blame", "blamed"),
                    ("clear", "cleared"),
                    ("unsure", "unsure"),
                ):
                    tag("li", words, f"verdict-{name}")

    def _selected(self, told: Any) -> None:
        self.shown.clear()
        with self.shown:
            for index in told["shown"]:
                number = int(index)
                if not 0 <= number < len(self.work.training_set):
                    continue
                label = self.work.class_name(int(self.work.labels[number]))
                with tag(
                    "a", classes="tile", href=address("/investigation", search=self.search, example=number)
                ):
                    Sight(self.work, "train").show(number, f"training example {self.work.name_of(number)}")
                    tag("span", label, "names")
                    tag("span", self.work.name_of(number), "quiet")
