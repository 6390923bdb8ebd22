"""How Sphinx builds the documentation: offline, with every warning an error (`make docs`)."""

from __future__ import annotations

import sys
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

import unpoison

project = "unpoison"
author = "The unpoison authors"
copyright = "The unpoison authors"
version = release = unpoison.__version__

sys.path.insert(0, str(Path(__file__).parent / "_ext"))
extensions = ["generated", "myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "_ext"]
source_suffix = {".md": "markdown"}

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# In docstrings a word in single backticks is code, as in Markdown.
default_role = "code"
napoleon_numpy_docstring = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = f"unpoison {release}"
html_copy_source = False
html_math_renderer = "mathml"


def math_ml(formula: str, *, as_block: bool) -> str:
    """A formula as MathML, which browsers draw without a script."""
    # Brackets of MathML grow without a command.
    return tex2mathml(formula.replace(r"\big", ""), as_block=as_block)


def inline_math(translator: HTML5Translator, node: nodes.Element) -> None:
    """A formula in the text."""
    translator.body.append(math_ml(node.astext(), as_block=False))
    raise nodes.SkipNode


def display_math(translator: HTML5Translator, node: nodes.Element) -> None:
    """A formula as a block."""
    translator.body.append(f'<div class="math">{math_ml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (inline_math, None), (display_math, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
