"""`Defense`: the face through which a training run is defended."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

from unpoison.data import TrainingSet


class Defense(ABC):
    """Chooses, before each epoch, the examples to train on.

    `repr` of a defense must show everything that decides its choices: checkpoints are told apart by it. A
    defense that remembers something between epochs gives it in `state` and takes it back in `restore`, and
    starts anew at epoch 0, so that one object can defend several runs.
    """

    @abstractmethod
    def keep(self, epoch: int, model: nn.Module, training_set: TrainingSet, alive: Tensor) -> Tensor:
        """Bool[n]: the examples to train on in `epoch`.

        Arguments:
            epoch: counted from 0.
            model: as trained so far, in eval mode; given back as it was.
            training_set: the whole set, on the model's device.
            alive: Bool[n], the examples kept in the epoch before; at epoch 0 those that the run includes.
                Examples that the run does not include are never trained on, whatever is returned.
        """

    def state(self) -> dict[str, Tensor]:
        """What the defense remembers between epochs, for the checkpoint."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027  (most defenses remember nothing)
        """Take back what `state` gave."""
