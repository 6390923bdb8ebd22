"""`ClassificationTask`: cross-entropy with hard labels, measured by the margin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from torch import Tensor, nn

from unpoison._inputs import Inputs
from unpoison._stable import cross_entropy, margin
from unpoison.errors import InputError
from unpoison.models import OutputLogits, logits_of
from unpoison.tasks._task import Batch, Task


@final
@dataclass(frozen=True)
class ClassificationTask(Task):
    """Cross-entropy with hard labels, measured by minus the margin. A batch is (inputs, Int64[b] labels).

    The measurement is `m = logsumexp_{c != y} z_c - z_y`, minus the log-odds of label y (Park et al., TRAK,
    2023), as in the published experiments of Delta-Influence. The loss is `softplus(m)`, whose gradient
    `sigmoid(m) grad m` does not cancel for examples that are fitted to a probability near 1: in float32 the
    textbook form, softmax minus one-hot, is exactly 0 from a margin of 17 on.

    Arguments:
        output: the key, attribute or place of the logits in what the model returns, where it is not a tensor,
            a tuple that begins with one, a mapping or object with `logits`, or a mapping with one tensor.
        values: what the numbers are. Of "probabilities" the logarithms are taken. None is "logits", except
            that numbers which look like probabilities are refused.

    A single logit z, of shape [b] or [b 1], stands for two classes with the logits 0 and z.
    """

    output: str | int | None = None
    values: Literal["logits", "probabilities"] | None = None

    def __post_init__(self) -> None:
        if self.values not in (None, "logits", "probabilities"):
            raise InputError(f"values: expected 'logits' or 'probabilities', found {self.values!r}")

    def logits(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """Float[b classes] of the inputs."""
        return logits_of(model, inputs, output=self.output, values=self.values or "logits")

    def adapted(self, model: nn.Module) -> nn.Module:
        """The model itself where its output is clear; else behind an adapter that returns its logits."""
        if self.output is None and self.values is None:
            return model
        return OutputLogits(model, output=self.output, values=self.values or "logits")

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy of each example."""
        return cross_entropy(self.logits(model, batch[0]), batch[1], reduction="none")

    def measurement(self, model: nn.Module, batch: Batch) -> Tensor:
        """Minus the margin of each query's label over all other classes."""
        return margin(self.logits(model, batch[0]), batch[1])

    def sampled_loss(self, model: nn.Module, batch: Batch, noise: Tensor) -> Tensor:
        """Cross-entropy under labels drawn from the softmax of the logits."""
        logits = self.logits(model, batch[0])
        cumulative = logits.detach().double().softmax(1).cumsum(1)
        drawn = (cumulative < noise[:, None]).sum(1).clamp_(max=logits.shape[1] - 1)
        return cross_entropy(logits, drawn, reduction="none")
