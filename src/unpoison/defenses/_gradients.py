"""Last-layer gradients of the loss: what each example pulls the logits towards."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.training import predict


def logit_gradients(logits: Tensor, labels: Tensor) -> Tensor:
    """Float64[n classes]: the gradient of each example's cross-entropy by its logits, softmax minus one-hot.

    In float64, because late in training most of them are nearly zero and the softmax nearly one.

    Raises:
        InputError: as `check_logits`.
    """
    check_logits(logits, labels)
    gradients = logits.double().softmax(1)
    gradients[torch.arange(len(labels), device=labels.device), labels] -= 1
    return gradients


def check_logits(logits: Tensor, labels: Tensor) -> None:
    """That a defense can use them.

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
    """A model as if the bias of its classifier were zero; the model itself is not touched."""

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
        model: given back as it was.
        training_set: the examples.
        without_bias: leave out the bias of the classifier, the last linear layer that has one logit a class;
            nothing is left out where there is no such layer or it has no bias.
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
