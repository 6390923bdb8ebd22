"""SVG elements, scales with round ticks, and text from data.

Figures are written as SVG text and not by a plotting library: their text stays text (searchable, selectable,
readable by a screen reader), they take fonts and colours from the page, equal data give equal bytes, and no
class name is read as markup (matplotlib reads `$...$` as mathematics).
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import final

import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape

Floats = npt.NDArray[np.float64]

_SPACE = re.compile(r"\s+")
_ISOLATE, _END_ISOLATE = "\u2068", "\u2069"


def plain(text: object, *, limit: int | None = None) -> str:
    """A string from data as one line of plain text. It still has to be escaped.

    Line breaks and tabs become spaces; control, format and bidirectional override characters, and halves of
    surrogate pairs, are removed: they could reverse the rest of a sentence or make the page impossible to
    encode. A string with right-to-left letters is wrapped by an isolate.

    >>> plain("T-shirt\\n/top\\x00"), plain("a" * 9, limit=4)
    ('T-shirt /top', 'aaa…')
    """
    kept = []
    for character in _SPACE.sub(" ", str(text)).strip():
        category = unicodedata.category(character)
        if category == "Cs":
            kept.append("\ufffd")
        elif category not in ("Cc", "Cf", "Zl", "Zp"):
            kept.append(character)
    line = "".join(kept)
    if limit is not None and len(line) > limit:
        line = line[: limit - 1] + "…"
    if any(unicodedata.bidirectional(character) in ("R", "AL") for character in line):
        return f"{_ISOLATE}{line}{_END_ISOLATE}"
    return line


def number(value: float, digits: int = 3) -> str:
    """A number as text: thousands in groups, a true minus sign, no trailing zeros.

    >>> number(5000), number(-0.01234), number(7.7e6), number(float("nan")), number(1.2e-9)
    ('5,000', '−0.0123', '7.7 × 10⁶', 'not a number', '1.2 × 10⁻⁹')
    """
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    size = abs(value)
    if size == int(size) and size < 1e6:
        text = f"{size:,.0f}"
    elif 1e-3 <= size < 1e5:
        decimals = max(0, digits - 1 - math.floor(math.log10(size)))
        text = f"{size:,.{decimals}f}"
        if "." in text:
            text = text.rstrip("0").rstrip(".")
    else:
        exponent = math.floor(math.log10(size))
        mantissa = round(size / 10.0**exponent, digits - 1)
        if mantissa >= 10:
            mantissa, exponent = mantissa / 10, exponent + 1
        power = "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        text = power if mantissa == 1 else f"{mantissa:g} × {power}"
    return f"−{text}" if value < 0 else text


def coordinate(value: float) -> str:
    """A coordinate to a tenth of a pixel, in as few characters as possible."""
    text = f"{value:.1f}"
    text = text.removesuffix(".0")
    return "0" if text == "-0" else text


@final
@dataclass(frozen=True)
class Scale:
    """A map from data to pixels: linear, logarithmic from .5 up (counts), or asinh (signed, heavy tails).

    `knee` is the value up to which the asinh scale is close to linear.
    """

    low: float
    high: float
    start: float
    stop: float
    kind: str = "linear"
    knee: float = 1.0

    def _bend(self, values: npt.ArrayLike) -> Floats:
        array = np.asarray(values, dtype=np.float64)
        if self.kind == "log":
            return np.log10(np.maximum(array, 0.5))
        if self.kind == "asinh":
            return np.asarray(np.arcsinh(array / self.knee))
        return array

    def __call__(self, values: npt.ArrayLike) -> Floats:
        """Pixels of the values; values outside the scale are clipped to its ends."""
        low, high = (float(self._bend(bound)) for bound in (self.low, self.high))
        share = (self._bend(values) - low) / (high - low)
        return self.start + np.clip(share, 0.0, 1.0) * (self.stop - self.start)

    def at(self, value: float) -> float:
        """The pixel of one value."""
        return float(self(value))

    def edges(self, count: int) -> Floats:
        """Bin edges in data units, equally wide on the screen."""
        low, high = (float(self._bend(bound)) for bound in (self.low, self.high))
        bent = np.linspace(low, high, count + 1)
        if self.kind == "asinh":
            return np.asarray(np.sinh(bent) * self.knee)
        return np.asarray(10.0**bent) if self.kind == "log" else bent

    def ticks(self, wanted: int = 5) -> list[float]:
        """Round values inside the scale, at most about `wanted`.

        >>> Scale(0, 50, 0, 100).ticks()
        [0.0, 10.0, 20.0, 30.0, 40.0, 50.0]
        >>> Scale(0.5, 5000, 0, 100, "log").ticks()
        [1.0, 10.0, 100.0, 1000.0]
        >>> Scale(-1e6, 1e6, 0, 100, "asinh", 100.0).ticks()
        [-1000000.0, -10000.0, 0.0, 10000.0, 1000000.0]
        """
        if self.kind == "log":
            top = math.floor(math.log10(max(self.high, 1.0)))
            step = max(1, math.ceil((top + 1) / (wanted + 1)))
            return [10.0**power for power in range(0, top + 1, step)]
        if self.kind == "asinh":
            first = math.floor(math.log10(self.knee)) + 1
            last = max(first, math.floor(math.log10(max(abs(self.low), abs(self.high)))))
            step = max(1, math.ceil((last - first + 1) / max(1, wanted // 2)))
            sizes = [10.0**power for power in range(last, first - 1, -step)]
            ticks = sorted([-size for size in sizes] + [0.0] + sizes)
            return [tick for tick in ticks if self.low <= tick <= self.high]
        span = self.high - self.low
        raw = span / wanted
        magnitude = 10.0 ** math.floor(math.log10(raw))
        step_size = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * (1 - 1e-9))
        first_index = math.ceil(self.low / step_size - 1e-9)
        last_index = math.floor(self.high / step_size + 1e-9)
        return [float(f"{index * step_size:.12g}") for index in range(first_index, last_index + 1)]


def fitted(values: npt.ArrayLike, start: float, stop: float, *, margin: float = 0.04) -> Scale:
    """A scale that shows all finite values: linear, or asinh when a few of them would flatten the rest.

    Raw influence under a small absolute damping spans seven decades in both directions, while most examples
    lie within a few hundred of zero; there a linear axis would show one bar.
    """
    array = np.asarray(values, dtype=np.float64).ravel()
    array = array[np.isfinite(array)]
    if array.size == 0:
        return Scale(0.0, 1.0, start, stop)
    low, high = float(array.min()), float(array.max())
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        pad = abs(high) * 0.1 or 1.0
        return Scale(low - pad, high + pad, start, stop)
    inner = np.quantile(array, [0.05, 0.95])
    bulk = float(inner[1] - inner[0])
    if bulk > 0 and high - low > 60 * bulk:
        knee = float(np.quantile(np.abs(array), 0.5)) or bulk
        edge = np.sinh(np.arcsinh(np.array([low, high]) / knee) * (1 + margin)) * knee
        return Scale(float(edge[0]), float(edge[1]), start, stop, "asinh", knee)
    pad = margin * (high - low)
    return Scale(low - pad, high + pad, start, stop)


def element(name: str, content: str | Markup = "", /, **attributes: object) -> Markup:
    """One SVG element; attribute values and plain-string content are escaped, `Markup` content is kept.

    Underscores in attribute names become hyphens; `class_` is `class`; attributes that are None are left out.

    >>> element("text", "a < b", class_="tick", text_anchor="end", x=1.25)
    Markup('<text class="tick" text-anchor="end" x="1.2">a &lt; b</text>')
    """
    parts = [name]
    for key, value in attributes.items():
        if value is None:
            continue
        text = coordinate(value) if isinstance(value, float) else str(value)
        parts.append(f'{key.rstrip("_").replace("_", "-")}="{escape(text)}"')
    opening = " ".join(parts)
    return Markup(f"<{opening}>{escape(content)}</{name}>" if content else f"<{opening}/>")


@final
@dataclass
class Canvas:
    """A figure: elements in drawing order inside a view box of `width` x `height` pixels."""

    width: int
    height: int
    title: str
    description: str
    identifier: str
    parts: list[Markup] = field(default_factory=list)

    def add(self, name: str, content: str | Markup = "", /, **attributes: object) -> None:
        """Draw one element on top of the others."""
        self.parts.append(element(name, content, **attributes))

    def text(
        self, x: float, y: float, content: str, kind: str, anchor: str = "start", **more: object
    ) -> None:
        """Write text whose baseline begins (or ends, or has its middle) at the point."""
        self.add("text", content, x=float(x), y=float(y), class_=kind, text_anchor=anchor, **more)

    def lines(self, kind: str, points: Iterable[tuple[float, float]], *, closed: bool = False) -> None:
        """Straight lines from point to point."""
        path = "L".join(f"{coordinate(x)} {coordinate(y)}" for x, y in points)
        self.add("path", class_=kind, d=f"M{path}{'z' if closed else ''}")

    def horizontal(self, kind: str, left: float, right: float, y: float) -> None:
        """A line at height `y`."""
        self.add("path", class_=kind, d=f"M{coordinate(left)} {coordinate(y)}H{coordinate(right)}")

    def dots(self, x: Floats, y: Floats, kind: str) -> None:
        """Many round dots as one path, about ten bytes each."""
        points = "".join(f"M{coordinate(a)} {coordinate(b)}h0" for a, b in zip(x, y, strict=True))
        if points:
            self.add("path", class_=kind, d=points)

    def triangles(self, x: Floats, y: Floats, kind: str, size: float = 4.0) -> None:
        """Many upright triangles as one path."""
        half, rise = coordinate(size), coordinate(1.7 * size)
        points = "".join(
            f"M{coordinate(a)} {coordinate(b - size)}l{half} {rise}h-{coordinate(2 * size)}z"
            for a, b in zip(x, y, strict=True)
        )
        if points:
            self.add("path", class_=kind, d=points)

    def x_axis(self, scale: Scale, y: float, label: str, *, wanted: int = 5, percent: bool = False) -> None:
        """A horizontal axis at height `y`, with ticks and its label below it."""
        self.horizontal("axis", scale.start, scale.stop, y)
        for tick in scale.ticks(wanted):
            x = scale.at(tick)
            self.add("path", class_="axis", d=f"M{coordinate(x)} {coordinate(y)}v4")
            self.text(x, y + 17, f"{tick:g} %" if percent else number(tick), "tick", "middle")
        self.text((scale.start + scale.stop) / 2, y + 36, label, "label", "middle")

    def y_axis(
        self, scale: Scale, x: float, label: str, *, wanted: int = 5, right: float | None = None
    ) -> None:
        """A vertical axis at `x`: ticks left of it, light lines to `right`, and its label on top."""
        for tick in scale.ticks(wanted):
            y = scale.at(tick)
            if right is not None:
                self.horizontal("grid", x, right, y)
            self.text(x - 7, y + 4, number(tick), "tick", "end")
        self.text(0, 12, label, "label")

    def render(self) -> Markup:
        """The `<svg>` element, with title and description for screen readers."""
        identifiers = f"{self.identifier}-title {self.identifier}-description"
        head = [
            element("title", self.title, id=f"{self.identifier}-title"),
            element("desc", self.description, id=f"{self.identifier}-description"),
        ]
        return element(
            "svg",
            Markup("\n").join([*head, *self.parts]),
            xmlns="http://www.w3.org/2000/svg",
            viewBox=f"0 0 {self.width} {self.height}",
            role="img",
            aria_labelledby=identifiers,
            class_="figure",
        )


def hatch() -> Markup:
    """The pattern `#hatch` of dark diagonal lines, with which the style sheet fills dark bars."""
    lines = element("rect", width=5, height=5, class_="hatch-ground") + element(
        "path", d="M0 0V5", class_="hatch-line"
    )
    pattern = element(
        "pattern",
        lines,
        id="hatch",
        width=5,
        height=5,
        patternUnits="userSpaceOnUse",
        patternTransform="rotate(45)",
    )
    return element("svg", element("defs", pattern), class_="definitions", aria_hidden="true")
