"""Templates, style sheets and scripts of the pages, and the policy that allows them."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import resources

from jinja2 import DictLoader, Environment, StrictUndefined

from unpoison.report._svg import plain


def resource(name: str) -> str:
    """The text of a file of this package."""
    return resources.files("unpoison.report").joinpath(name).read_text(encoding="utf-8")


def policy(style: str, script: str | None = None) -> str:
    """A Content-Security-Policy that allows images as `data:`, this style sheet and this script, if any."""
    allowed = f"default-src 'none'; img-src data:; style-src {_hash(style)}; "
    if script is not None:
        allowed += f"script-src {_hash(script)}; "
    return allowed + "base-uri 'none'; form-action 'none'"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@cache
def environment() -> Environment:
    """The templates; they escape everything, and an undefined name is an error."""
    names = ("page.html.j2", "leaderboard.html.j2")
    made = Environment(
        loader=DictLoader({name: resource(name) for name in names}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters["plain"] = plain
    return made
