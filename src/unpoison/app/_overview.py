"""Overview: model and data, accuracy by class, confusion, and the wrong answers with their verdicts."""

from __future__ import annotations

from typing import Any, final

import numpy as np

from unpoison._statistics import Proportion
from unpoison.app._elements import (
    Sight,
    address,
    attempt,
    button,
    figures,
    select,
    set_attribute,
    set_class,
    set_text,
    tag,
)
from unpoison.app._guard import LARGEST_BODY
from unpoison.app._inputs import InputSet, Upload
from unpoison.app._searches import Search
from unpoison.app._work import Work
from unpoison.detectors import describe, names
from unpoison.report import number, percent, plain, verdict
from unpoison.training import Trained

PAGE = 48
_LARGEST_TABLE = 12


@final
class Overview:
    """The view.

    Arguments:
        work: what it shows.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        self.kind = next((one.kind for one in reversed(work.inputs)), "")
        self.label = -1
        self.first = 0
        self.method = work.case.method
        self.tiles: list[_Tile] = []
        self.own_tiles: list[_Tile] = []
        tag("h1", "Overview")
        self.head = tag("div")
        with tag("section", aria_labelledby="wrong"):
            tag("h2", "Wrong answers", id="wrong")
            self.controls = tag("div", classes="controls")
            self.grid = tag("div", classes="grid")
        if work.case.read_input is not None:
            self._uploads()
        with tag("section", aria_labelledby="classes"):
            tag("h2", "Accuracy by class", id="classes")
            self.classes = tag("div", classes="columns")
        self._shown: tuple[Any, ...] = ()
        self._uploaded = 0
        self.update()

    def update(self) -> None:
        """Show what has changed."""
        for row in range(self._uploaded, len(self.work.uploads)):
            with self.own:
                self.own_tiles.append(_Tile.of_upload(self, self.work.uploads[row], row))
        self._uploaded = len(self.work.uploads)
        known = (len(self.work.answers), len(self.work.searches), self.kind, self.label, self.first)
        if known != self._shown:
            self._shown = known
            self._draw()
        for one in [*self.tiles, *self.own_tiles]:
            one.update()

    def _uploads(self) -> None:
        with tag("section", aria_labelledby="own"):
            tag("h2", "An image of your own", id="own")
            with tag("div", classes="drop", id="drop", data_limit=LARGEST_BODY):
                with tag("label", classes="choice"):
                    tag("span", "Drop an image here, or choose one")
                    tag("input", type="file", accept="image/*", id="upload")
                tag(
                    "p",
                    f"Up to {LARGEST_BODY >> 20} MiB; prepared as the training images are, and kept on this "
                    "machine beside the decisions.",
                    "quiet",
                )
            tag("p", "", "trouble", role="alert", id="refused")
            self.own = tag("div", classes="grid")

    def _draw(self) -> None:
        for part in (self.head, self.controls, self.grid, self.classes):
            part.clear()
        self.tiles = []
        with self.head:
            self._figures()
        given, answers = self.work.input_set(self.kind), self.work.answers.get(self.kind)
        if given is None or answers is None:
            with self.grid:
                waiting = "The model is being asked about the test inputs ..."
                if given is None:
                    waiting = "There is no test set to look for wrong answers in; give --test-data."
                if not self.work.can_ask:
                    waiting = "Only findings are known; give --model and --data to ask the model and heal it."
                tag("p", waiting, "quiet")
            return
        wrong = answers.wrong()
        if self.label >= 0:
            wrong = wrong[answers.labels[wrong] == self.label]
        traced = [self.work.search_of(given.suspect(row)) is not None for row in wrong.tolist()]
        wrong = wrong[np.argsort(np.logical_not(traced), kind="stable")]
        last = max(0, (len(wrong) - 1) // PAGE)
        self.first = min(self.first, last)
        shown = wrong[self.first * PAGE : (self.first + 1) * PAGE]
        with self.controls:
            self._choices()
            with tag("span", classes="pager"):
                button("Previous page", lambda: self._turn(-1), key="[", disabled=self.first == 0 or None)
                button("Next page", lambda: self._turn(1), key="]", disabled=self.first >= last or None)
            begin = self.first * PAGE
            of = f"{begin + 1:,} to {begin + len(shown):,} of " if len(shown) else ""
            tag(
                "p",
                f"{of}{len(wrong):,} wrong answers, the traced and then the most confident first",
                "quiet",
            )
        with self.grid:
            self.tiles = [_Tile.of_input(self, given, int(row)) for row in shown.tolist()]
        with self.classes:
            if (of_all := self.work.answers.get(self.work.inputs[0].kind)) is not None:
                self._by_class(of_all)
                self._confusion(of_all)

    def _turn(self, by: int) -> None:
        self.first = max(0, self.first + by)
        self.update()

    def _choose(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self, name, value)
        self.first = 0
        self.update()

    def _choices(self) -> None:
        work = self.work
        if len(work.inputs) > 1:
            kinds = [(one.kind, one.title) for one in work.inputs]
            select("Inputs", kinds, self.kind, lambda value: self._choose(kind=value))
        every = [("-1", "all"), *((str(label), work.class_name(label)) for label in range(len(work.names)))]
        select("True class", every, str(self.label), lambda value: self._choose(label=int(value)))
        methods = [name for name in names() if describe(name).needs_observation]
        select(
            "Trace by",
            [(one, one) for one in methods],
            self.method,
            lambda value: setattr(self, "method", value),
        )

    def _figures(self) -> None:
        work = self.work
        model = work.case.model
        recipe = model.recipe if isinstance(model, Trained) else None
        network = "not known" if model is None else type(model).__name__
        told = ""
        if recipe is not None:
            network = f"{recipe.model}, width {recipe.width}"
            told = f"{recipe.epochs} epochs, learning rate {recipe.learning_rate:g}"
        shown = [
            ("Model", network, told),
            ("Training examples", f"{len(work.training_set):,}", f"{len(work.names):,} classes"),
        ]
        for one in work.inputs:
            if (answers := work.answers.get(one.kind)) is not None:
                shown.append(
                    (f"Accuracy, {one.title.lower()}", percent(answers.accuracy.rate), note(answers.accuracy))
                )
        searches = [one for one in work.searches if one.data.poison_found]
        shown.append(("Searches", f"{len(work.searches):,}", f"{len(searches):,} found poison"))
        figures(shown)

    def _by_class(self, answers: Any) -> None:
        with tag("table", classes="numbers"):
            tag("caption", "Share of test inputs that are answered rightly, with 95 % Wilson interval")
            with tag("thead"), tag("tr"):
                for text in ("Class", "Right", "n", "Interval", ""):
                    tag("th", text, scope="col")
            with tag("tbody"):
                for label, rate in enumerate(answers.by_class):
                    with tag("tr"):
                        tag("th", self.work.class_name(label), scope="row")
                        tag("td", percent(rate.rate))
                        tag("td", f"{rate.trials:,}")
                        low, high = rate.interval()
                        tag("td", f"{100 * low:.1f} – {100 * high:.1f} %" if rate.trials else "–")
                        with tag("td", classes="bar-cell"):
                            tag(
                                "meter",
                                min=0,
                                max=1,
                                value=round(rate.rate, 4) if rate.trials else 0,
                                aria_hidden="true",
                            )

    def _confusion(self, answers: Any) -> None:
        work, classes = self.work, len(self.work.names)
        if classes > _LARGEST_TABLE:
            with tag("table", classes="numbers"):
                tag("caption", "Most frequent confusions")
                with tag("thead"), tag("tr"):
                    for text in ("True class", "Answer", "Inputs"):
                        tag("th", text, scope="col")
                with tag("tbody"):
                    for label, answer, count in answers.confused(20):
                        with tag("tr"):
                            tag("th", work.class_name(label), scope="row")
                            tag("td", work.class_name(answer), "text")
                            tag("td", f"{count:,}")
            return
        most = max(1, int(answers.confusion.max()))
        with tag("div", classes="wide"), tag("table", classes="confusion"):
            tag("caption", "Confusion: number of test inputs by true class (rows) and answer (columns)")
            with tag("thead"), tag("tr"):
                tag("th", "True class", scope="col")
                for label in range(classes):
                    with tag("th", scope="col"):
                        tag("span", work.class_name(label), "upright")
            with tag("tbody"):
                for label in range(classes):
                    with tag("tr"):
                        tag("th", work.class_name(label), scope="row")
                        for answer in range(classes):
                            count = int(answers.confusion[label, answer])
                            shade = (
                                0
                                if not count
                                else 1 + min(4, int(4 * count / most))
                                if label != answer
                                else 6
                            )
                            tag("td", f"{count:,}" if count else "·", f"shade-{shade}")


@final
class _Tile:
    """An input: picture or text, label, answer, confidence, verdict, and what can be done.

    Arguments:
        view: that it is in.
        suspect: what the command calls it.
        called: what people call it.
        truth: the name of its class, where that is known.
        answer: the name of the class that the model gives.
        confidence: the probability that the model gives it.
        at: the kind and the number by which it is shown.
    """

    def __init__(
        self,
        view: Overview,
        suspect: str,
        called: str,
        *,
        truth: str,
        answer: str,
        confidence: float,
        at: tuple[str, int],
    ) -> None:
        self.view, self.suspect = view, suspect
        with tag("article", classes="tile"):
            kind, self.row = at
            row = self.row
            Sight(view.work, kind).show(row, f"input {called}")
            with tag("p", classes="names"):
                self.truth = tag("span", truth, "truth")
                tag("span", " answered ", "quiet")
                tag("strong", answer)
            tag("p", f"{called}, confidence {percent(confidence).replace(' ', chr(160))}", "quiet")
            self.true_class = self._ask_class(row) if kind == "upload" else None
            self.said = tag("p", "", "said")
            self.start = button("Trace", self._trace, classes="small", aria_label=f"Trace {called}")
            self.link = tag("a", "Investigate", "button small", href="/investigation")
        self.update()

    @classmethod
    def of_input(cls, view: Overview, given: InputSet, row: int) -> _Tile:
        """A test input."""
        work, answers, called = view.work, view.work.answers[given.kind], given.suspect(row)
        return cls(
            view,
            called,
            called,
            truth=work.class_name(int(answers.labels[row])),
            answer=work.class_name(int(answers.answers[row])),
            confidence=float(answers.confidence[row]),
            at=(given.kind, row),
        )

    @classmethod
    def of_upload(cls, view: Overview, given: Upload, row: int) -> _Tile:
        """An image of the user's own."""
        return cls(
            view,
            str(given.path),
            plain(given.path.name, limit=60),
            truth="",
            answer=view.work.class_name(given.answer),
            confidence=given.confidence,
            at=("upload", row),
        )

    def _ask_class(self, row: int) -> Any:
        """A list to say which class an image of the user's own is of."""
        work = self.view.work
        classes = [
            ("", "not known"),
            *((str(label), work.class_name(label)) for label in range(len(work.names))),
        ]
        label = work.uploads[row].label

        def choose(value: str) -> None:
            attempt(lambda: work.label_upload(row, int(value) if value else None))

        return select("True class", classes, "" if label is None else str(label), choose)

    def _trace(self) -> None:
        self.view.work.trace(self.suspect, self.view.method)

    def update(self) -> None:
        """Show the verdict, or how far the trace is."""
        search, job = self.view.work.search_of(self.suspect), self.view.work.job_of(self.suspect)
        known = search is not None or job is not None
        if self.true_class is not None:
            label = self.view.work.uploads[self.row].label
            set_text(self.truth, "" if label is None else self.view.work.class_name(label))
            set_attribute(self.true_class, "disabled", known or None)
        set_class(self.start, "hidden", known)
        set_class(self.link, "hidden", search is None)
        if search is not None:
            set_attribute(self.link, "href", address("/investigation", search=search.name))
            set_attribute(self.link, "title", verdict(search.data))
        set_class(self.said, "found", search is not None and search.data.poison_found)
        set_text(
            self.said, short_verdict(search) if search else (f"trace {job.state}" if job else "not traced")
        )


def short_verdict(search: Search) -> str:
    """The verdict of a search with its p-value beside its level."""
    data = search.data
    said = "poison found" if data.poison_found else "no poison found"
    if data.p_value is None or data.false_alarm_level is None:
        return said
    sign = "≤" if data.p_value <= data.false_alarm_level else ">"
    return f"{said}: p = {number(data.p_value)} {sign} level {number(data.false_alarm_level)}"


def note(rate: Proportion) -> str:
    """A rate's n and interval."""
    low, high = rate.interval()
    return f"{rate.successes:,} of {rate.trials:,}; 95 % interval {100 * low:.1f} – {100 * high:.1f} %"
