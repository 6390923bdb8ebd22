"""`EpochRecord`: the measurements of one epoch; free of torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, final

from unpoison._progress import Progress


@final
@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One epoch of training.

    Arguments:
        epoch: counted from 0.
        loss: mean over the epoch's examples, as trained on (augmented, in training mode).
        accuracy: share of the epoch's examples that were classified correctly, likewise.
        learning_rate: of the last step.
        examples: how many were trained on.
        seconds: wall-clock time.
    """

    epoch: int
    loss: float
    accuracy: float
    learning_rate: float
    examples: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def tell(self, progress: Progress | None, epochs: int, *, stage: str = "training") -> None:
        """Report the epoch, of so many, to `progress`."""
        if progress is not None:
            progress(stage, self.epoch + 1, epochs, loss=self.loss, accuracy=self.accuracy)
