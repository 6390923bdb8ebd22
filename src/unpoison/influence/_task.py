"""`Task`: what is learned and what is measured, as three functions of a model and a batch.

The engine does not depend on images, labels or cross-entropy. It needs the loss that the model was trained
on, a measurement whose influences are wanted, and, for the true Fisher matrix, the loss under labels drawn
from the model's own prediction. All three give one number an example.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

from torch import Tensor, nn

from unpoison._stable import cross_entropy, margin

Batch = tuple[Tensor, ...]


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


@final
@dataclass(frozen=True)
class ClassificationTask(Task):
    """Cross-entropy with hard labels, measured by minus the margin. A batch is (inputs, Int64[b] labels).

    The measurement is `m = logsumexp_{c != y} z_c - z_y`, minus the log-odds of label y (Park et al., TRAK,
    2023), as in the published experiments of Delta-Influence. The loss is `softplus(m)`, whose gradient
    `sigmoid(m) grad m` does not cancel for examples that are fitted to a probability near 1: in float32 the
    textbook form, softmax minus one-hot, is exactly 0 from a margin of 17 on.
    """

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy of each example."""
        inputs, labels = batch
        return cross_entropy(model(inputs), labels, reduction="none")

    def measurement(self, model: nn.Module, batch: Batch) -> Tensor:
        """Minus the margin of each query's label over all other classes."""
        inputs, labels = batch
        return margin(model(inputs), labels)

    def sampled_loss(self, model: nn.Module, batch: Batch, noise: Tensor) -> Tensor:
        """Cross-entropy under labels drawn from the softmax of the logits."""
        logits: Tensor = model(batch[0])
        cumulative = logits.detach().double().softmax(1).cumsum(1)
        drawn = (cumulative < noise[:, None]).sum(1).clamp_(max=logits.shape[1] - 1)
        return cross_entropy(logits, drawn, reduction="none")
