"""Methods against attacks: one number of each line of a leaderboard, a method a row, an attack a column.

A benchmark of many methods has hundreds of lines; what a reader wants first is one number of each, side by
side. There is a matrix for each number that the lines have, where they are of several attacks and methods.
The last column is the mean over the attacks; how many trials a number is of, and its interval, is in the
table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, final

from unpoison.evaluation import Line
from unpoison.report._figures import percent
from unpoison.report._table import attack_name, method_name

_MOST_SHADES: Final = 5


@final
@dataclass(frozen=True)
class Matrix:
    """One number of every method under every attack.

    Arguments:
        title: what the number is.
        meaning: in a sentence.
        attacks: headings of the columns.
        rows: name of the method, and its number under each attack, None where there is none.
        share: whether the numbers are shares, shown in per cent.
        trials: the least and the most trials that a number is of.
    """

    title: str
    meaning: str
    attacks: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float | None, ...]], ...]
    share: bool
    trials: tuple[int, int]

    @property
    def columns(self) -> tuple[str, ...]:
        """All headings."""
        return ("Method", *self.attacks, "Mean")

    def text_rows(self) -> Iterator[tuple[str, ...]]:
        """The cells of each row as text, the mean last."""
        for name, values in self.rows:
            yield (name, *map(self._text, (*values, mean(values))))

    def shaded_rows(self) -> Iterator[tuple[str, tuple[tuple[str, int], ...]]]:
        """Name, and each cell with how dark it is to be drawn: from 0 to 5, by the number."""
        for (name, *texts), (_, values) in zip(self.text_rows(), self.rows, strict=True):
            numbers = (0.0 if value is None else value for value in (*values, mean(values)))
            shades = (round(_MOST_SHADES * min(max(number, 0.0), 1.0)) for number in numbers)
            yield name, tuple(zip(texts, shades, strict=True))

    def _text(self, value: float | None) -> str:
        if value is None:
            return "–"
        return percent(value) if self.share else f"{value:.2f}"


def mean(values: Sequence[float | None]) -> float | None:
    """Of the values that are numbers.

    >>> mean((1.0, None, 2.0)), mean((None,))
    (1.5, None)
    """
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


@final
@dataclass(frozen=True)
class _Quantity:
    title: str
    meaning: str
    value: Callable[[Line], float | None]
    share: bool = True


def _trained(line: Line) -> bool:
    """Whether a network of its own answers: not so where a detector alone was asked."""
    return line.detector == "none" or line.unlearner != "none"


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _success(line: Line) -> float | None:
    return _number(line.success_rate.mean) if _trained(line) else None


def _accuracy(line: Line) -> float | None:
    return _number(line.clean_accuracy.mean) if _trained(line) else None


def _recall(line: Line) -> float | None:
    return line.true_positives.rate if _searched(line) and line.true_positives.trials else None


def _false_positives(line: Line) -> float | None:
    return line.false_positives.rate if _searched(line) and line.false_positives.trials else None


def _average_precision(line: Line) -> float | None:
    return _number(line.average_precision.mean) if _searched(line) else None


def _searched(line: Line) -> bool:
    return line.detector != "none" and not line.control


_QUANTITIES: Final = (
    _Quantity("Attack success", "share of the adversary's inputs that are answered as wanted", _success),
    _Quantity("Clean accuracy", "on clean test images", _accuracy),
    _Quantity("Recall", "share of the poisoned examples that are flagged", _recall),
    _Quantity("False positives", "share of the clean examples that are flagged", _false_positives),
    _Quantity(
        "Average precision",
        "area under the precision-recall curve of the scores",
        _average_precision,
        share=False,
    ),
    _Quantity(
        "Triggered inputs that are flagged at 1 % false positives",
        "of those that are answered as the attack wants",
        lambda line: line.screened_true_01.rate if line.screened_true_01.trials else None,
    ),
    _Quantity(
        "Area under the ROC curve",
        "of triggered against clean inputs",
        lambda line: _number(line.screened_auroc.mean),
        share=False,
    ),
)


def matrices(lines: Sequence[Line]) -> Iterator[Matrix]:
    """A matrix for each number that at least two methods have under at least three attacks."""
    attacks = list(dict.fromkeys(map(attack_name, lines)))
    if len(attacks) < 3:
        return
    shown = _short(attacks)
    for quantity in _QUANTITIES:
        cells: dict[str, dict[str, tuple[float, int]]] = {}
        for line in lines:
            value = quantity.value(line)
            if value is not None:
                cells.setdefault(_name(line), {})[attack_name(line)] = value, line.n
        if len(cells) < 2 or max(map(len, cells.values())) < 3:
            continue
        trials = [count for row in cells.values() for _, count in row.values()]
        rows = tuple(
            (name, tuple(row[attack][0] if attack in row else None for attack in attacks))
            for name, row in cells.items()
        )
        yield Matrix(
            quantity.title, quantity.meaning, shown, rows, quantity.share, (min(trials), max(trials))
        )


def _name(line: Line) -> str:
    """With the control, where two lines of a method differ in it alone."""
    found = method_name(line)
    return (
        found
        if line.control in ("", "no attack", "no defense", "perfect filter")
        else (f"{found} ({line.control})")
    )


def _short(attacks: Sequence[str]) -> tuple[str, ...]:
    """Without the budget, where it is the same for all."""
    names = [name.partition(", ") for name in attacks]
    same = len({rest for _, _, rest in names}) == 1
    return tuple(first for first, _, _ in names) if same else tuple(attacks)
