"""Measuring a model for a verb: rates where there is a test set, progress while it is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from unpoison.cli._console import Console
from unpoison.data import TrainingSet
from unpoison.evaluation import Measurement, measure
from unpoison.threats import PoisonSet
from unpoison.training import EpochRecord, Recipe, Trained


def measured(
    model: Trained | nn.Module, test: TrainingSet | None, poison: PoisonSet | None
) -> Measurement | None:
    """Accuracy, and the attack's success where the poison is known; None without a test set."""
    return None if test is None else measure(model, test, None if poison is None else poison.goal)


@contextmanager
def epochs(console: Console, what: str, recipe: Recipe) -> Iterator[Callable[[EpochRecord], None]]:
    """Yield an `on_epoch` that shows how far a training has come."""
    with console.progress(what, recipe.epochs, "epochs") as step:
        yield lambda record: step(record.epoch + 1, f"loss {record.loss:.3f}")


def per_cent(rate: float | None) -> str:
    """A rate for people.

    >>> per_cent(0.915), per_cent(None), per_cent(float("nan"))
    ('91.5 %', '-', '-')
    """
    return "-" if rate is None or math.isnan(rate) else f"{100 * rate:.1f} %"
