"""`Task`: what is learned and what is measured, as three functions of a model and a batch.

The engine does not depend on images, labels or cross-entropy. It needs the loss that the model was trained
on, a measurement whose influences are wanted, and, for the true Fisher matrix, the loss under labels drawn
from the model's own prediction. All three give one number an example.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

Batch = tuple[Any, ...]
"""As `Examples.batch` gives it: inputs (a tensor, or a mapping of tensors), then labels or other targets. The
first dimension of every tensor counts examples."""


class Task(ABC):
    """The loss, measurement and sampled loss of a model. The examples of a batch must not interact."""

    #: The shape of the uniform random numbers that `sampled_loss` needs for one example.
    noise_shape: tuple[int, ...] = ()

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Float[b]: the training loss of each example, not averaged over the batch."""

    @abstractmethod
    def measurement(self, model: nn.Module, batch: Batch) -> Tensor:
        """Float[q]: what is measured of each query; it should FALL as the query's label gets more likely.

        A positive influence score is then a proponent: see `score`. Where the gradient of the loss is a
        positive multiple of that of the measurement, scores that are divided by the length of the training
        gradient may differentiate the measurement in place of the loss.
        """

    @abstractmethod
    def sampled_loss(self, model: nn.Module, batch: Batch, noise: Tensor) -> Tensor:
        """Float[b]: the loss under targets drawn from the model's own prediction.

        Arguments:
            model: the model in evaluation mode.
            batch: as `Examples.batch` gives it.
            noise: `Float64[b, *noise_shape]`, uniform in [0, 1), a function of the seed and the example's
                index alone, so that factors depend neither on the batch size nor on the number of processes.
        """
