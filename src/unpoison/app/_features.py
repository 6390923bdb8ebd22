"""`Features`: what the model makes of each training example, for the map and the nearest example."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

from torch import Tensor

from unpoison import workflow
from unpoison.app._case import Case
from unpoison.app._shown import Named
from unpoison.detectors import principal_plane
from unpoison.errors import InputError

_DIRECTIONS = 16
"""The map has the first two."""


@final
class Features:
    """Rows of the index, or the features before the last layer, on their directions of largest variance.

    Arguments:
        case: whose training set they are of.
        changed: called as they are read.
    """

    def __init__(self, case: Case, changed: Callable[[], None]) -> None:
        self.case, self._changed = case, changed
        self.rows: Tensor | None = None
        """Float32[n k], once they have been read."""
        self.progress = (0, len(case.training_set))
        self.closed = False

    @property
    def kind(self) -> str:
        """What they are, for people."""
        return "features of the model" if self.case.index is None else "gradient"

    def read(self) -> None:
        """Read them: a pass over the training set, if there is no index.

        Raises:
            InputError: the index is of another training set, or `closed` was set.
        """
        examples, model, index = self.case.training_set, self.case.model, self.case.index
        if index is not None:
            found = index.principal_plane(_DIRECTIONS)
            if len(found) != len(examples):
                raise InputError(f"{index.directory}: is of another training set")
        else:
            assert model is not None
            assert not isinstance(examples, Named)
            network = workflow.network_of(model)
            found = principal_plane(network, examples, directions=_DIRECTIONS, progress=self._told)
        self.rows = found

    def _told(self, stage: str, done: int, total: int, /, **metrics: float) -> None:
        if self.closed:
            raise InputError("stopped")
        self.progress = (done, total)
        self._changed()
