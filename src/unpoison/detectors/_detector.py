"""`Detector`: the interface of every method that finds the training examples responsible for something."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from unpoison._progress import Progress
from unpoison.data import Examples
from unpoison.detectors._findings import Findings
from unpoison.detectors._observation import Observation
from unpoison.influence import Parts
from unpoison.registry import Method

if TYPE_CHECKING:
    from unpoison.detectors._estimates import Measured


class Detector(ABC):
    """Finds the training examples that are responsible for a wrong prediction, or that look like poison.

    A detector is a frozen configuration; `find` changes neither the model nor the training set.
    """

    method: ClassVar[Method]

    @abstractmethod
    def find(
        self,
        model: nn.Module,
        training_set: Examples,
        observation: Observation | None = None,
        *,
        reference: Examples | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Findings:
        """Score every training example and flag those that are responsible.

        Arguments:
            model: takes a batch of inputs, such as Float[b c h w] in [0, 1], and returns Float[b classes]
                logits.
            training_set: what the model was trained on. Detectors that look at pixels take a `TrainingSet`
                of 8-bit images alone.
            observation: the wrong prediction to trace; detectors that look at the training set alone need
                none.
            reference: labelled images that the model was not trained on and that are trusted to be clean, for
                detectors that calibrate on such; the training set itself is used when None.
            seed: of everything random.
            progress: called with the stage, examples done and examples to do.

        Raises:
            InputError: the detector needs an observation and there is none, or the model does not fit the
                set.
        """

    def memory_needed(self, measured: Measured) -> Parts:
        """Bytes by what takes them, beside the model and the training set, when most is taken.

        What `find` is refused by before it starts; nothing for a detector that does not say.

        Arguments:
            measured: the network and the training set.
        """
        return {}
