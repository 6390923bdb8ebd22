"""Methods against attacks: one number of each line of a leaderboard, a method a row, an attack a column.

A benchmark of many methods has hundreds of lines; what a reader wants first is one number of each, side by
side. There is a matrix for each number that the lines have, where they are of several attacks and methods.
The last column is the mean over the attacks; how many trials a number is of, and its interval, is in the
table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, final

from unpoison._statistics import Proportion
from unpoison.evaluation import Line, Mean
from unpoison.report._figures import percent
from unpoison.report._table import attack_name, method_name

_SHADES: Final = 5


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
        darkest: the number that is drawn darkest.
        trials: the least and the most trials that a number is of.
    """

    title: str
    meaning: str
    attacks: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float | None, ...]], ...]
    share: bool
    darkest: float
    trials: tuple[int, int]

    @property
    def columns(self) -> tuple[str, ...]:
        """All headings."""
        return ("Method", *self.attacks, "Mean")

    def text_rows(self) -> Iterator[tuple[str, ...]]:
        """The cells of each row as text, the mean last."""
        for name, values in self._with_means():
            yield (name, *map(self._text, values))

    def shaded_rows(self) -> Iterator[tuple[str, tuple[tuple[str, int], ...]]]:
        """Name, and each cell with how dark it is to be drawn: from 0 to 5, by the number."""
        for name, values in self._with_means():
            shades = (round(_SHADES * min((value or 0.0) / self.darkest, 1.0)) for value in values)
            yield name, tuple(zip(map(self._text, values), shades, strict=True))

    def _with_means(self) -> Iterator[tuple[str, tuple[float | None, ...]]]:
        for name, values in self.rows:
            yield name, (*values, Mean.of(one for one in values if one is not None).mean)

    def _text(self, value: float | None) -> str:
        if value is None:
            return "–"
        return percent(value) if self.share else f"{value:.2f}"


Counted = tuple[float, int] | None
"""A number and how many trials it is of; None where there is none."""


@final
@dataclass(frozen=True)
class _Quantity:
    title: str
    meaning: str
    value: Callable[[Line], Counted]
    share: bool = True
    bounded: bool = True


def _of(mean: Mean) -> Counted:
    return (mean.mean, mean.n) if mean.n else None


def _of_trained(line: Line, mean: Mean) -> Counted:
    """None where a detector alone was asked, whose network is the undefended one."""
    return _of(mean) if line.detector == "none" or line.unlearner != "none" else None


def _of_search(line: Line, proportion: Proportion) -> Counted:
    return (proportion.rate, line.n) if _searched(line) and proportion.trials else None


def _searched(line: Line) -> bool:
    return line.detector != "none" and not line.control


def _seconds(line: Line) -> Counted:
    """Of what the method does itself: training under a defense, or search and healing."""
    stages = ("train",) if line.defense != "none" else ("find", "screen", "heal")
    spent = [line.seconds[stage] for stage in stages if stage in line.seconds]
    return (sum(spent), line.n) if spent and not line.control else None


_QUANTITIES: Final = (
    _Quantity(
        "Attack success",
        "share of the adversary's inputs that are answered as wanted",
        lambda line: _of_trained(line, line.success_rate),
    ),
    _Quantity("Clean accuracy", "on clean test images", lambda line: _of_trained(line, line.clean_accuracy)),
    _Quantity(
        "Recall",
        "share of the poisoned examples that are flagged",
        lambda line: _of_search(line, line.true_positives),
    ),
    _Quantity(
        "False positives",
        "share of the clean examples that are flagged",
        lambda line: _of_search(line, line.false_positives),
    ),
    _Quantity(
        "Average precision",
        "area under the precision-recall curve of the scores",
        lambda line: _of(line.average_precision) if _searched(line) else None,
        share=False,
    ),
    _Quantity(
        "Triggered inputs that are flagged at 1 % false positives",
        "of those that are answered as the attack wants",
        lambda line: (line.screened_true_01.rate, line.n) if line.screened_true_01.trials else None,
    ),
    _Quantity(
        "Area under the ROC curve",
        "of triggered against clean inputs",
        lambda line: _of(line.screened_auroc),
        share=False,
    ),
    _Quantity(
        "Seconds",
        "of training under a defense, or of search and healing",
        _seconds,
        share=False,
        bounded=False,
    ),
)


def matrices(lines: Sequence[Line]) -> Iterator[Matrix]:
    """A matrix for each number that at least two methods have under at least three attacks."""
    attacks = list(dict.fromkeys(map(attack_name, lines)))
    if len(attacks) < 3:
        return
    for quantity in _QUANTITIES:
        cells: dict[str, dict[str, tuple[float, int]]] = {}
        for line in lines:
            value = quantity.value(line)
            if value is not None:
                cells.setdefault(method_name(line), {})[attack_name(line)] = value
        if len(cells) < 2 or max(map(len, cells.values())) < 3:
            continue
        counted = [one for row in cells.values() for one in row.values()]
        trials = [count for _, count in counted]
        yield Matrix(
            title=quantity.title,
            meaning=quantity.meaning,
            attacks=_short(attacks),
            rows=tuple(
                (name, tuple(row[attack][0] if attack in row else None for attack in attacks))
                for name, row in cells.items()
            ),
            share=quantity.share,
            darkest=1.0 if quantity.bounded else max(value for value, _ in counted) or 1.0,
            trials=(min(trials), max(trials)),
        )


def _short(attacks: Sequence[str]) -> tuple[str, ...]:
    """Without the budget, where it is the same for all."""
    names = [name.partition(", ") for name in attacks]
    same = len({rest for _, _, rest in names}) == 1
    return tuple(first for first, _, _ in names) if same else tuple(attacks)
