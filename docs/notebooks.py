"""Run the notebooks of the documentation and keep their outputs: `python docs/notebooks.py [NAME...]`.

A notebook is a page, `docs/notebooks/NAME.md`. Each block of Python is a cell; a block of text right after it
is what the cell printed, and an image after that the figure that it drew. Both are written anew here, and so
is `NAME.ipynb` beside the page, the same for Jupyter. The tests run the cells, too, and write nothing.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

FOLDER: Final = Path(__file__).with_name("notebooks")
_CELL: Final = re.compile(
    r"```python\n(?P<code>.*?)```\n"
    r"(?:\n```text\n(?P<printed>.*?)```\n)?"
    r"(?:\n!\[(?P<caption>[^\]\n]*)\]\((?P<picture>[^)\n]+)\)\n)?",
    re.DOTALL,
)


@dataclass(frozen=True)
class Cell:
    """Prose, or code with what it printed and the figure that it drew."""

    source: str
    is_code: bool = False
    printed: str = ""
    caption: str = ""
    picture: str = ""

    def markdown(self) -> str:
        """The cell as it stands in the page."""
        if not self.is_code:
            return self.source
        text = f"```python\n{self.source}```\n"
        if self.printed:
            text += f"\n```text\n{self.printed}```\n"
        return text + (f"\n![{self.caption}]({self.picture})\n" if self.picture else "")


def read(page: Path) -> list[Cell]:
    """The cells of a page, in order."""
    text, cells, end = page.read_text(encoding="utf-8"), [], 0
    for found in _CELL.finditer(text):
        cells.append(Cell(text[end : found.start()]))
        printed, caption, picture = (found[name] or "" for name in ("printed", "caption", "picture"))
        cells.append(Cell(found["code"], True, printed, caption, picture))
        end = found.end()
    return [*cells, Cell(text[end:])]


def run(cells: list[Cell], names: dict[str, Any]) -> Iterator[tuple[Cell, Any]]:
    """Run the code of cells one after another in `names`: each cell as it is now, and its figure or None.

    Raises:
        ValueError: a cell draws and has no place for its figure, or the other way round.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    for cell in cells:
        if not cell.is_code:
            yield cell, None
            continue
        pyplot.close("all")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(cell.source, "notebook", "exec"), names)
        figure = pyplot.gcf() if pyplot.get_fignums() else None
        if (figure is None) == bool(cell.picture):
            raise ValueError(
                f"a figure and an image after the block, or neither; not one of them:\n{cell.source}"
            )
        yield replace(cell, printed=printed.getvalue()), figure
    pyplot.close("all")


def notebook(cells: list[Cell], folder: Path) -> dict[str, Any]:
    """The cells as a notebook of Jupyter (format 4.5), with the pictures that lie in `folder`."""
    written: list[dict[str, Any]] = []
    for number, cell in enumerate(one for one in cells if one.source.strip()):
        kept: dict[str, Any] = {"id": f"cell-{number}", "metadata": {}, "source": cell.source.strip("\n")}
        if not cell.is_code:
            written.append({"cell_type": "markdown", **kept})
            continue
        outputs: list[dict[str, Any]] = []
        if cell.printed:
            outputs.append({"output_type": "stream", "name": "stdout", "text": cell.printed})
        if cell.picture:
            picture = base64.b64encode((folder / cell.picture).read_bytes()).decode()
            data = {"image/png": picture, "text/plain": cell.caption}
            outputs.append({"output_type": "display_data", "metadata": {}, "data": data})
        done = sum(one["cell_type"] == "code" for one in written) + 1
        written.append({"cell_type": "code", "execution_count": done, "outputs": outputs, **kept})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": written, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def keep(page: Path) -> None:
    """Run a page, and write it, its figures and its `.ipynb` anew."""
    cells = []
    for cell, figure in run(read(page), {"__name__": "__main__"}):
        if figure is not None:
            figure.savefig(
                page.parent / cell.picture, dpi=90, bbox_inches="tight", metadata={"Software": None}
            )
        cells.append(cell)
    page.write_text("".join(cell.markdown() for cell in cells), encoding="utf-8")
    text = json.dumps(notebook(cells, page.parent), indent=1, ensure_ascii=False)
    page.with_suffix(".ipynb").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    os.chdir(FOLDER)
    for page in [FOLDER / f"{name}.md" for name in sys.argv[1:]] or sorted(FOLDER.glob("*.md")):
        begin = time.perf_counter()
        keep(page)
        print(f"{page.stem}: {time.perf_counter() - begin:.0f} s")
