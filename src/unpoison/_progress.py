"""`Progress`: the one callback by which everything that takes long says how far it has come."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called now and then by whatever takes long; what it raises ends the work.

    Arguments:
        stage: what is being done, such as "training", "factors" or "scores".
        done: how much of it.
        total: how much there is to do, in epochs, steps or examples.
        metrics: numbers of interest by name, such as `loss`.
    """

    def __call__(self, stage: str, done: int, total: int, /, **metrics: float) -> None:
        """Take note."""
