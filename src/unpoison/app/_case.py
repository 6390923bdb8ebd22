"""`Case`: what a page is about, as the command has read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from unpoison.data import TrainingSet
    from unpoison.threats import PoisonSet
    from unpoison.workflow import Model


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Case:
    """A model, what it was trained on, and the runs that are worked on.

    Arguments:
        model: in eval mode.
        training_set: what it was trained on, with any poison in it.
        test_set: clean, labelled inputs that it was not trained on, where there are some.
        poison: what was put into the training set, where that is known.
        runs: run directories of the command, about this model.
        out: where decisions, traces and healed models are kept; made when needed.
        options: the words of the command line that name this model and data, for the work that is done in
            processes of its own.
    """

    model: Model
    training_set: TrainingSet
    test_set: TrainingSet | None
    poison: PoisonSet | None
    runs: tuple[Path, ...]
    out: Path
    options: tuple[str, ...]
