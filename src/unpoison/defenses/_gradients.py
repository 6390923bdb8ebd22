"""Last-layer gradients: the gradient of each example's loss in its logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from unpoison._stable import softmax_minus_one_hot
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.training import predict


def logit_gradients(logits: Tensor, labels: Tensor) -> Tensor:
    """Float64[n classes]: softmax minus one-hot.

    In float64, since late in training most gradients are nearly zero; for the same reason the label's entry
    is minus the sum of the others.

    Raises:
        InputError: as `check_logits`.
    """
    check_logits(logits, labels)
    return softmax_minus_one_hot(logits.double(), labels)


def check_logits(logits: Tensor, labels: Tensor) -> None:
    """Check the logits of a training set.

    Raises:
        InputError: the shapes do not fit, logits are not finite, or labels are out of range.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        raise InputError(
            f"logits and labels: expected [n classes] and int64 [n], found {tuple(logits.shape)} and "
            f"{labels.dtype} {tuple(labels.shape)}"
        )
    wrong = ~torch.isfinite(logits).all(1)
    if bool(wrong.any()):
        raise InputError(
            f"logits: {int(wrong.sum())} of {len(logits)} examples have logits that are not finite, the "
            f"first at index {int(wrong.nonzero()[0])}; the training has diverged, lower its learning rate"
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise InputError(f"labels: expected 0..{logits.shape[1] - 1}, found some outside")


class _WithoutBias(nn.Module):
    """A model with the bias of its classifier set to zero; the model itself is not changed."""

    def __init__(self, model: nn.Module, bias: str) -> None:
        super().__init__()
        self.model, self.bias = model, bias

    def forward(self, images: Tensor) -> Tensor:
        zero = {self.bias: torch.zeros_like(self.model.get_parameter(self.bias))}
        logits: Tensor = functional_call(self.model, zero, (images,))
        return logits


def training_logits(model: nn.Module, training_set: TrainingSet, *, without_bias: bool = False) -> Tensor:
    """Float32[n classes]: the logits of the whole set, in eval mode and without augmentation.

    Arguments:
        model: left as it was.
        training_set: the examples.
        without_bias: set the bias of the classifier to zero: of the last linear layer with a logit for each
            class, if there is one.
    """
    if without_bias:
        linear = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module.out_features >= training_set.num_classes
        ]
        if linear and model.get_submodule(linear[-1]).bias is not None:
            name = f"{linear[-1]}.bias" if linear[-1] else "bias"
            return predict(_WithoutBias(model, name), training_set.images)
    return predict(model, training_set.images)
