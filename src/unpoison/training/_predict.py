"""Predictions of a model, in eval mode and in batches; the model is left as it was."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unpoison._statistics import Proportion
from unpoison.data import TrainingSet
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


def accuracy(model: nn.Module, training_set: TrainingSet, *, batch_size: int = 256) -> Proportion:
    """The share of `training_set` that the model classifies as labelled."""
    if not len(training_set):
        return Proportion(0, 0)
    predicted = predict(model, training_set.images, batch_size=batch_size).argmax(1)
    return Proportion(int((predicted == training_set.labels).sum()), len(training_set))
