"""The directives of the documentation whose tables are generated when it is built.

    {methods} detector needs_observation    the registered methods of a kind, all or those with a property
    {options} trace                         the options of a verb of the command
    {shared-options}                        the options of all verbs
    {recipes}                               the presets of `Recipe`
    {memory}                                what the methods state of their memory
    {identifiers}                           the identifiers of MITRE ATLAS and OWASP in exports
    {papers}                                the papers of the methods, with the methods of each
    {app-speed}                             how fast the page of the app was when it was measured

The functions give Markdown and need no Sphinx, so that tests can call them.
"""

from __future__ import annotations

import ast
import json
import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from tyro.conf import Positional

from unpoison import attacks, defenses, detectors, input_detectors, unlearners
from unpoison.registry import Method, Registry
from unpoison.training import Recipe

POSITIONAL = Positional[int].__metadata__[0]

REGISTRIES: dict[str, Registry[Any]] = {
    registry.kind: registry
    for registry in (
        attacks.METHODS,
        defenses.METHODS,
        detectors.METHODS,
        input_detectors.METHODS,
        unlearners.METHODS,
    )
}


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def methods(kind: str, *wanted: str) -> list[str]:
    """The table of the methods of a kind with all properties in `wanted`; "not_" is the opposite of one."""
    kind = kind.replace("_", " ")
    registry = REGISTRIES[kind]
    chosen = [method for method in map(registry.describe, registry.names()) if _has(method, wanted)]
    own = {
        "attack": ("Labels, knowledge", lambda one: f"{one.labels} labels; {one.knowledge or 'the data'}"),
        "detector": ("Can find nothing", lambda one: "yes" if one.can_find_nothing else "no"),
        "input detector": ("Inputs", lambda one: "images in [0, 1]" if one.changes_pixels else "any"),
        "defense": ("Drops examples", _drops),
        "unlearner": ("Is told", _told),
    }[kind]
    return table(
        ("Method", "Paper", own[0], "Cost", "Presets"),
        [
            (
                f"`{one.name}`: **{one.title}.** {one.summary}"
                + (f" Needs the extra `{one.extra}`." if one.extra else ""),
                one.paper,
                own[1](one),
                one.cost,
                ", ".join(f"`{preset}`" for preset in one.presets),
            )
            for one in chosen
        ],
    )


def _drops(method: Method) -> str:
    return (
        "no; certifies"
        if method.certifies
        else "yes"
        if method.drops_examples or method.copies_drops
        else "no"
    )


def _told(method: Method) -> str:
    if not method.needs_findings:
        return "clean examples, or what findings left"
    return "the examples to forget, which it reads" if method.reads_forget_set else "the examples to forget"


def _has(method: Method, wanted: Sequence[str]) -> bool:
    return all(bool(getattr(method, name.removeprefix("not_"))) != name.startswith("not_") for name in wanted)


def options(verb: str) -> list[str]:
    """The table of the options of a verb, without those that all verbs share."""
    from unpoison.cli import _options

    [chosen] = [one for one in _options.VERBS if one.__name__.lower() == verb]
    return table(("Option", "Meaning"), _rows(chosen, shared=_options.RunOptions))


def shared_options() -> list[str]:
    """The table of the options that all verbs share."""
    from unpoison.cli import _options

    return table(("Option", "Meaning"), _rows(_options.RunOptions, shared=None))


def _rows(options_class: type, *, shared: type | None) -> list[tuple[str, str]]:
    hints = typing.get_type_hints(options_class, include_extras=True)
    rows = []
    for field in fields(options_class):
        hint = hints[field.name]
        if hint is shared:
            continue
        if is_dataclass(hint):
            rows += _rows(hint, shared=shared)
            continue
        marks = getattr(hint, "__metadata__", ())
        value = "".join(getattr(one, "metavar", None) or "" for one in marks)
        kind = typing.get_args(hint)[0] if marks else hint
        if typing.get_origin(kind) is typing.Literal and not value:
            value = "|".join(map(str, typing.get_args(kind)))
        called = next((one.name for one in marks if getattr(one, "name", None)), field.name)
        name = "" if POSITIONAL in marks else f"--{called.replace('_', '-')}"
        text = "".join(getattr(one, "help", None) or "" for one in marks)
        text = re.sub(r"(?<!`)--[a-z][a-z-]*", r"`\g<0>`", text)
        rows.append((f"`{name} {value}`".replace("` ", "`").replace(" `", "`"), text + _default(field)))
    return rows


def _default(field: Field[Any]) -> str:
    if field.default is MISSING:
        return " Required."
    unset = field.default is None or field.default is False or field.default == ()
    return "" if unset else f" Default: `{field.default}`."


def recipes() -> list[str]:
    """The table of the presets of `Recipe`."""
    shown = ("model", "width", "epochs", "batch_size", "learning_rate", "weight_decay", "schedule")
    presets = {name: Recipe.preset(name) for name in Recipe.presets()}
    rows = [
        [f"`{name}`", *(str(getattr(one, field) or "") for field in shown)] for name, one in presets.items()
    ]
    return table(["Preset", *(field.replace("_", " ") for field in shown)], rows)


def memory() -> list[str]:
    """The table of the sentences that begin with "Memory" in the docstrings of the methods' modules."""
    rows = []
    for registry in REGISTRIES.values():
        for name in registry.names():
            spec = find_spec(registry.module(name))
            assert spec is not None
            assert spec.origin is not None
            text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
            if found := re.search(r"\bMemory(?::| for)\s(.+?)\.(?=\s|$)", text, re.DOTALL):
                rows.append((f"`{name}`", registry.kind, " ".join(found[1].split())))
    return table(("Method", "Kind", "Memory"), rows)


def identifiers() -> list[str]:
    """The table of the identifiers in exports."""
    from unpoison.report import identifiers_of

    of_data = identifiers_of(traced=False)
    rows = [
        (f"[{one.id}]({one.uri})", one.name, f"{one.taxonomy} {one.version}", "" if one in of_data else "yes")
        for one in identifiers_of(traced=True)
    ]
    return table(("Identifier", "Name", "Taxonomy", "Only of a traced answer"), rows)


def papers() -> list[str]:
    """The table of the papers of papers.bib that methods name, with these methods."""
    methods_of = methods_of_papers()
    rows = []
    text = (Path(__file__).parents[1] / "papers.bib").read_text(encoding="utf-8")
    for entry in text.split("@misc")[1:]:
        found = dict(re.findall(r"  (\w+) = \{+(.*?)\}+,?\n", entry))
        first, *others = found["author"].replace("{\\'\\i}", "í").split(" and ")
        authors = f"{first.partition(',')[0]}{' et al.' if others else ''} {found['year']}"
        link = f"[{found['eprint']}](https://arxiv.org/abs/{found['eprint']})"
        if names := methods_of.get(found["eprint"]):
            rows.append((found["title"], authors, link, ", ".join(names)))
    return table(("Paper", "Authors", "arXiv", "Methods"), sorted(rows))


def methods_of_papers() -> dict[str, list[str]]:
    """The methods that name a paper, by its arXiv identifier."""
    found: dict[str, list[str]] = {}
    for registry in REGISTRIES.values():
        for name in registry.names():
            for arxiv in re.findall(r"arXiv (\d{4}\.\d{5})", registry.describe(name).paper):
                found.setdefault(arxiv, []).append(f"`{name}`")
    return found


def app_speed() -> list[str]:
    """The table of what `docs/app_screens.py speed` has measured."""
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "app.json"
    if not path.is_file():
        return ["Not measured yet."]
    found = json.loads(path.read_text(encoding="utf-8"))
    names = {
        "lasso_10k": "lasso of 10,000 points, until it is drawn",
        "first_view": "the slowest of these first views",
    }
    rows = [(names.get(name, name), f"{1000 * value:.0f} ms") for name, value in found["seconds"].items()]
    rows += [(f"panning {name}", f"{value:.0f} frames a second") for name, value in found["frames"].items()]
    load = found["machine"]["load"]
    told = f", while other work kept {load:.0f} processes ready to run" if load >= 1 else ""
    return [*table(("What", "Best of its repeats"), rows), "", f"Measured on {found['date']}{told}."]


DIRECTIVES: dict[str, Callable[..., list[str]]] = {
    "methods": methods,
    "options": options,
    "shared-options": shared_options,
    "recipes": recipes,
    "memory": memory,
    "identifiers": identifiers,
    "papers": papers,
    "app-speed": app_speed,
}


class Generated(Directive):
    """A directive that is replaced by the Markdown of a function of this module."""

    optional_arguments = 9

    def run(self) -> list[Any]:
        from docutils import nodes

        lines = DIRECTIVES[self.name](*self.arguments)
        container = nodes.container()
        self.state.nested_parse(StringList(lines, source=__file__), self.content_offset, container)
        return container.children


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    for name in DIRECTIVES:
        app.add_directive(name, Generated)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
