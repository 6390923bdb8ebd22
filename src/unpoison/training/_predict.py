"""Predictions of a model, in eval mode and in batches; the model is left as it was."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unpoison._inputs import placed
from unpoison._statistics import Proportion
from unpoison.data import Examples, TrainingSet
from unpoison.models import as_input, device_of, fastest_layout, logits_of, preserved, usual_mode


def predict(model: nn.Module, images: Tensor, *, batch_size: int = 256) -> Tensor:
    """Logits Float32[n classes] of the images, on the device of the images.

    One pass in eval mode without gradients; batches are moved to the model's device one at a time.

    Arguments:
        model: takes Float[b c h w] in [0, 1], in the precision of its parameters.
        images: UInt8[n c h w], or Float[n c h w] in [0, 1].
        batch_size: images a forward pass; bounds the memory.

    Raises:
        InputError: the model fails on such images, or returns no logits.
    """
    layout = fastest_layout(model, images)
    with usual_mode(device_of(model)), preserved(model), torch.no_grad():
        rows = [
            logits_of(model, as_input(model, batch, layout)).float().to(images.device)
            for batch in torch.split(images, max(batch_size, 1))
        ]
    return torch.cat(rows)


def predict_examples(model: nn.Module, examples: Examples, *, batch_size: int = 256) -> Tensor:
    """Logits Float32[n classes] of any examples, where their labels lie. Memory: a batch, and the result."""
    if isinstance(examples, TrainingSet):
        return predict(model, examples.images, batch_size=batch_size)
    device, rows = device_of(model), []
    with usual_mode(device), preserved(model), torch.no_grad():
        for inputs, *_ in examples.in_batches(batch_size):
            rows.append(logits_of(model, placed(inputs, device)).float().to(examples.labels.device))
    return torch.cat(rows)


def accuracy(model: nn.Module, examples: Examples, *, batch_size: int = 256) -> Proportion:
    """The share of `examples` that the model classifies as labelled."""
    if not len(examples):
        return Proportion(0, 0)
    predicted = predict_examples(model, examples, batch_size=batch_size).argmax(1)
    return Proportion(int((predicted == examples.labels).sum()), len(examples))
