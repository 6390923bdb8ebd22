"""The leaderboard as text: matrices and the table in Markdown, the table in LaTeX."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from unpoison.evaluation import Results, leaderboard
from unpoison.report._matrix import Matrix, matrices
from unpoison.report._svg import plain
from unpoison.report._table import table_of


def leaderboard_markdown(results: Results) -> str:
    """Methods against attacks, where there are several, and the table, without empty columns."""
    found = leaderboard(results)
    table = table_of(found).without_empty()
    rows = [[cell.text + (f" ({cell.note})" if cell.note else "") for cell in row] for row in table.rows]
    meanings = [f"- {column.name}: {column.meaning}." for column in table.columns if column.group]
    parts = [part for matrix in matrices(found) for part in _matrix_markdown(matrix)]
    return "\n".join([*parts, *_rows([column.name for column in table.columns], rows), "", *meanings, ""])


def _matrix_markdown(matrix: Matrix) -> Iterator[str]:
    least, most = matrix.trials
    count = f"{least} trials" if least == most else f"{least} to {most} trials"
    yield f"**{matrix.title}**: {matrix.meaning}; each number is of {count}."
    yield ""
    yield from _rows(matrix.columns, matrix.text_rows())
    yield ""


def _rows(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(map(_markdown, headings)) + " |"
    yield "|" + "---|" * len(headings)
    for row in rows:
        yield "| " + " | ".join(map(_markdown, row)) + " |"


def leaderboard_latex(results: Results) -> str:
    """The table as LaTeX, for the package booktabs, without empty columns."""
    table = table_of(leaderboard(results)).without_empty()
    body = [
        " & ".join(_latex(cell.text + (f" ({cell.note})" if cell.note else "")) for cell in row) + r" \\"
        for row in table.rows
    ]
    return "\n".join(
        [
            f"% {plain(results.name)}: {len(results.table)} of {results.planned} trials",
            r"\begin{tabular}{ll" + "r" * (len(table.columns) - 2) + "}",
            r"\toprule",
            " & ".join(_latex(column.name) for column in table.columns) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def _markdown(text: str) -> str:
    return plain(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


_LATEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "→": r"$\to$",
    "–": "--",
    "<": "$<$",
    ">": "$>$",
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in plain(text))
