"""`Case`: what a page is about, as the command has read it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from unpoison.app._shown import Named, Words
    from unpoison.data import Examples, Inputs
    from unpoison.influence import InfluenceIndex
    from unpoison.threats import PoisonSet
    from unpoison.workflow import Model


def _no_words(method: str) -> Sequence[str]:
    """Nothing beside model and data."""
    return ()


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Case:
    """A model, what it was trained on, and the runs that are worked on.

    Arguments:
        model: in eval mode; None where only findings are known, and nothing can be asked.
        training_set: what it was trained on, with any poison in it; or what findings say of it.
        test_set: clean, labelled inputs that it was not trained on, where there are some.
        poison: what was put into the training set, where that is known.
        runs: run directories of the command about this model, and directories of findings.
        out: where decisions, traces and healed models are kept; made when needed.
        index: of the model and the training set, where there is one: the map is then made of its rows.
        options: the words of the command line that name model and data, for the work that is done in
            processes of its own.
        method: the detector that traces are started with.
        tracing: the words of the command line that a trace by a detector takes besides those.
        read_input: makes an input of an uploaded image file; None where the inputs are no images.
        words: the text of token ids, where a tokenizer is known.
    """

    model: Model | None
    training_set: Examples | Named
    test_set: Examples | None
    poison: PoisonSet | None
    runs: tuple[Path, ...]
    out: Path
    index: InfluenceIndex | None = None
    options: tuple[str, ...] = ()
    method: str = "calibrated"
    tracing: Callable[[str], Sequence[str]] = _no_words
    read_input: Callable[[Path], Inputs] | None = None
    words: Words | None = None
