"""Plain HTML elements, by NiceGUI. Text is always text: nothing from data is read as HTML."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, final
from urllib.parse import urlencode
from weakref import WeakKeyDictionary

from nicegui import Client, background_tasks, ui
from nicegui.elements.mixins.text_element import TextElement

from unpoison.app._content import is_pictured, text_for
from unpoison.errors import UnpoisonError

if TYPE_CHECKING:
    from unpoison.app._work import Work

_ALERTS: WeakKeyDictionary[Client, Any] = WeakKeyDictionary()


@final
class Tag(TextElement):
    """An element of any kind with text in it."""

    def __init__(self, tag: str, text: str) -> None:
        super().__init__(tag=tag, text=text)


def tag(kind: str, /, text: str = "", classes: str = "", **attributes: Any) -> Any:
    """An element; underscores in the names of attributes become hyphens, and None leaves one out."""
    made = Tag(kind, text)
    if classes:
        made.classes(classes)
    for key, value in attributes.items():
        if value is not None:
            made.props[key.replace("_", "-")] = value
    return made


def alert() -> None:
    """Make the line of this window that says what was refused."""
    _ALERTS[ui.context.client] = tag("p", "", "trouble", role="alert", id="alert")


def tell(text: str) -> None:
    """Say in this window what was refused, or by "" that nothing is."""
    set_text(_ALERTS[ui.context.client], text)


def attempt(action: Callable[[], Any]) -> None:
    """Do what was asked for; why not, where it cannot be done."""
    tell("")
    try:
        action()
    except UnpoisonError as error:
        tell(str(error))


def button(
    text: str,
    on_click: Callable[[], Any] | None = None,
    *,
    key: str = "",
    shown: str = "",
    script: str | None = None,
    classes: str = "",
    **attributes: Any,
) -> Any:
    """A button, with the key that presses it.

    Arguments:
        text: what it does.
        on_click: is called when it is pressed, or when the script says so.
        key: as `KeyboardEvent.key` has it; several with a space between.
        shown: what to write for the key.
        script: a function of JavaScript that is called in the window first; `emit()` then calls `on_click`.
        classes: of style.
        attributes: of the element.
    """
    made = tag(
        "button", classes=f"button {classes}", type="button", aria_keyshortcuts=key or None, **attributes
    )
    with made:
        tag("span", text)
        if key:
            tag("kbd", shown or key.split()[0], aria_hidden="true")
    made.on("click", None if on_click is None else lambda: attempt(on_click), js_handler=script)
    return made


@final
class Sight:
    """Where examples of a kind are looked at: a picture, or a text.

    Arguments:
        work: what knows them.
        kind: of the examples, as `unpoison.app._content` names them.
        search: the name of the search that they are of, for suspects and differences.
        attributes: of the element.
    """

    def __init__(self, work: Work, kind: str, search: str = "", **attributes: Any) -> None:
        self.work, self.kind, self.search = work, kind, search
        self.number = -1
        self.pictured = is_pictured(work, kind)
        if self.pictured:
            self.element = tag("img", "", "pixels", loading="lazy", **attributes)
        else:
            self.element = tag("p", "", "text", **attributes)

    def show(self, number: int, alt: str) -> None:
        """Show an example."""
        if number == self.number:
            return
        self.number = number
        if self.pictured:
            query = {"search": self.search} if self.search else {}
            source = address(f"/image/{self.kind}/{number}.png", v=self.work.version, **query)
            set_attribute(self.element, "src", source)
            set_attribute(self.element, "alt", alt)
        else:
            background_tasks.create(self._read(number))

    async def _read(self, number: int) -> None:
        text = await asyncio.to_thread(text_for, self.work, self.kind, number, self.search)
        if self.number == number:
            set_text(self.element, text)


def address(path: str, **query: object) -> str:
    """An address of this server; what is put into it is encoded.

    >>> address("/map", search="a&b")
    '/map?search=a%26b'
    """
    return f"{path}?{urlencode(query)}" if query else path


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], links: Sequence[str | None] = (), caption: str = ""
) -> None:
    """A table of text; the first cell of a row is a link where there is one."""
    with tag("div", classes="wide"), tag("table", classes="numbers left"):
        if caption:
            tag("caption", caption)
        with tag("thead"), tag("tr"):
            for text in head:
                tag("th", text, scope="col")
        with tag("tbody"):
            for place, row in enumerate(rows):
                link = links[place] if links else None
                with tag("tr"):
                    for column, text in enumerate(row):
                        with tag("td", "" if link and not column else text):
                            if link and not column:
                                tag("a", text, href=link)


def told_counts(counts: Mapping[Any, int]) -> str:
    """How many examples there are of each verdict."""
    named = {"blame": "Blamed", "clear": "cleared", "unsure": "unsure", "undecided": "undecided"}
    return ", ".join(f"{words} {counts[name]:,}" for name, words in named.items())


def set_attribute(element: Any, name: str, value: Any) -> None:
    """Set an attribute, or remove it by None; where nothing changes, nothing is sent to the browser."""
    if element.props.get(name) != value:
        if value is None:
            element.props.pop(name, None)
        else:
            element.props[name] = value


def set_text(element: Any, text: str) -> None:
    """Set a text where it is another one."""
    if element.text != text:
        element.text = text


def set_class(element: Any, name: str, on: bool) -> None:
    """Give an element a class, or take it away."""
    if (name in element.classes) != on:
        element.classes(add=name) if on else element.classes(remove=name)


def select(
    label: str, options: Sequence[tuple[str, str]], value: str, on_change: Callable[[str], Any]
) -> Any:
    """A labelled list to choose one of (value, text) from."""
    with tag("label", classes="choice"):
        tag("span", label)
        with tag("select", name=label) as made:
            for key, text in options:
                tag("option", text, value=key, selected=True if key == value else None)
    made.on("change", lambda event: on_change(str(event.args)), js_handler="(e) => emit(e.target.value)")
    return made


def figures(values: Sequence[tuple[str, str, str]]) -> None:
    """Numbers at the head of a page: what, how much, and a note with n and interval."""
    with tag("dl", classes="figures"):
        for label, value, note in values:
            with tag("div"):
                tag("dt", label)
                tag("dd", value, "value")
                if note:
                    tag("dd", note, "note")


def drawing(svg: str, caption: str) -> None:
    """A figure of the report; its SVG is escaped where it is made."""
    with tag("figure", classes="figure"):
        ui.html(svg, sanitize=False)
        tag("figcaption", caption)
