"""Plain HTML elements, by NiceGUI. Text is always text: nothing from data is read as HTML."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, final
from urllib.parse import urlencode
from weakref import WeakKeyDictionary

from nicegui import Client, background_tasks, ui
from nicegui.elements.mixins.text_element import TextElement

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
    on_click: Callable[[], Any],
    *,
    key: str = "",
    shown: str = "",
    classes: str = "",
    **attributes: Any,
) -> Any:
    """A button, with the key that presses it.

    Arguments:
        text: what it does.
        on_click: is called when it is pressed.
        key: as `KeyboardEvent.key` has it; several with a space between.
        shown: what to write for the key.
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
    made.on("click", lambda: attempt(on_click))
    return made


@final
class Sight:
    """Where an example is looked at: its picture, or its text.

    Arguments:
        work: what knows it.
        attributes: of the element of the picture.
    """

    def __init__(self, work: Work, **attributes: Any) -> None:
        self.work = work
        self.shown: tuple[str, int, str] | None = None
        self.image = tag("img", "", "pixels hidden", loading="lazy", **attributes)
        self.words = tag("p", "", "text hidden", tabindex="-1")

    def show(self, kind: str, number: int, alt: str, search: str = "") -> None:
        """Show the example `number` of a kind, as `Work.picture` has them."""
        wanted = (kind, number, search)
        if wanted == self.shown:
            return
        self.shown = wanted
        pictured = self.work.is_pictured(kind)
        set_class(self.image, "hidden", not pictured)
        set_class(self.words, "hidden", pictured)
        if pictured:
            query = {"search": search} if search else {}
            source = address(f"/image/{kind}/{number}.png", v=self.work.version, **query)
            set_attribute(self.image, "src", source)
            set_attribute(self.image, "alt", alt)
        else:
            background_tasks.create(self._read(wanted))

    async def _read(self, wanted: tuple[str, int, str]) -> None:
        text = await asyncio.to_thread(self.work.text, *wanted)
        if self.shown == wanted:
            set_text(self.words, text)


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
