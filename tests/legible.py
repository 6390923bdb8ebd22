"""What WCAG 2.1 asks of a page, computed in the browser: contrast of text and marks, focus, the keyboard."""

from __future__ import annotations

from typing import Any

COLOURS = """
  const parse = (colour) => {
    const [r, g, b, alpha = 1] = colour.match(/[\\d.]+/g).map(Number);
    return alpha > 0.99 ? [r, g, b] : null;
  };
  const linear = (value) => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const ratio = (one, other) => {
    const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const colours = (text) => (text.match(/rgba?\\([^)]*\\)/g) || []).map(parse).filter(Boolean);
  // All colours that lie behind an element: several, where there is a gradient.
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const style = getComputedStyle(element);
      const found = colours(`${style.backgroundImage} ${style.backgroundColor}`);
      if (found.length) return found;
    }
    return [[255, 255, 255]];
  };
  const least = (colour, others) => Math.min(...others.map((other) => ratio(colour, other)));
"""
FAINT_TEXT = (
    "() => {"
    + COLOURS
    + """
  const faint = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let seen = 0;
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.getClientRects().length) continue;
    if (element.closest("script, style, option, .skip")) continue;
    const style = getComputedStyle(element);
    const colour = parse(element.closest("svg") ? style.fill : style.color);
    seen++;
    const found = colour ? least(colour, behind(element)) : 0;
    if (found < 4.5) faint.push(`${walker.currentNode.data.trim()}: ${found.toFixed(2)}`);
  }
  return [seen, faint];
}"""
)
"""How many texts there are, and those whose contrast is below 4.5."""
MARKS = (
    "() => {"
    + COLOURS
    + """
  const found = {};
  const white = [255, 255, 255];
  const keep = (name, all) => all.length && (found[name] = Math.max(...all.map((one) => ratio(one, white))));
  for (const one of document.querySelectorAll(".tile .mark"))
    if (one.textContent) {
      const style = getComputedStyle(one);
      keep(`mark ${one.textContent}`, colours(`${style.backgroundColor} ${style.boxShadow}`));
    }
  for (const one of document.querySelectorAll(".legend li")) {
    const style = getComputedStyle(one, "::before");
    const edge = style.borderTopWidth === "0px" ? "" : style.borderTopColor;
    keep(`legend ${one.textContent}`, colours(`${style.backgroundColor} ${style.backgroundImage} ${edge}`));
  }
  for (const one of document.querySelectorAll(".button.blame, .button.clear, .button.unsure"))
    keep(`button ${one.textContent}`, colours(getComputedStyle(one).borderTopColor));
  return found;
}"""
)
"""The contrast of each mark of a decision, and of each colour of the legend, with the page."""
POINTS = (
    "() => {"
    + COLOURS
    + """
  return Math.min(...[...new Set(map.colours)].map((one) =>
    ratio([one & 255, (one >> 8) & 255, (one >> 16) & 255], [255, 255, 255])));
}"""
)
"""The least contrast of a point of the map with the page."""
SHAPES = """() => {
  const { x, y } = map.view, p = map.columns.plane, kept = map.pixels;
  const { width, height } = map.$refs.canvas;
  const scale = map.view.scale;
  map.view = { x: width / 2 - p[0] * scale, y: height / 2 + p[1] * scale, scale };
  const shapes = [1, 2, 3].map((verdict) => {
    map.pixels = new Uint32Array(width * height).fill(0xffffffff);
    map.mark(0, verdict, 0);
    return map.pixels.reduce((all, pixel, at) => (pixel ? all : [...all, at]), []).join();
  });
  map.pixels = kept;
  map.view = { x, y, scale };
  return shapes;
}"""
"""The pixels of the mark of each decision on the map, whatever its colour."""
CONTROLS = """() => {
  const all = "a[href], button, input, select, textarea, canvas[tabindex], summary";
  const shown = (one) => one.getClientRects().length && !one.disabled && !one.closest(".skip");
  const controls = [...document.querySelectorAll(all)].filter(shown);
  controls.forEach((one, at) => (one.dataset.at = at));
  const stray = [...document.querySelectorAll("body *")].filter((one) =>
    shown(one) && getComputedStyle(one).cursor === "pointer" && !one.closest(all) && !one.closest("label"));
  return [controls.map((one) => one.textContent || one.id || one.tagName), stray.map((one) => one.outerHTML)];
}"""
"""What can be pressed, and what looks like it and is no control."""
FOCUS = (
    "() => {"
    + COLOURS
    + """
  const one = document.activeElement, style = getComputedStyle(one);
  const colour = style.outlineStyle === "none" ? null : parse(style.outlineColor);
  const contrast = colour ? least(colour, behind(one.parentElement)) : 0;
  return [Number(one.dataset.at ?? -1), parseFloat(style.outlineWidth) >= 2 && contrast >= 3];
}"""
)
"""The control that has the focus, and whether that is seen."""


def reached_by_tabulator(window: Any) -> tuple[list[str], list[str]]:
    """The controls of a page that the tabulator does not reach, and those whose focus cannot be seen."""
    names, stray = window.evaluate(CONTROLS)
    assert names
    missing, unseen = dict(enumerate(names)), []
    window.evaluate("() => document.activeElement.blur()")
    for _ in range(len(names) + 10):
        window.keyboard.press("Tab")
        at, seen = window.evaluate(FOCUS)
        if at >= 0 and missing.pop(at, None) is not None and not seen:
            unseen.append(names[at])
        if not missing:
            break
    window.evaluate("() => document.activeElement.blur()")
    return [*missing.values(), *stray], unseen
