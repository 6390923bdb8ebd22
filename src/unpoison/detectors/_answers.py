"""What a model answers to inputs of any kind, and to all examples of a set in bounded memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from unpoison.data import Examples, Inputs, TrainingSet
from unpoison.models import logits_of, preserved
from unpoison.training import predict


def answers_of(model: nn.Module, inputs: Inputs) -> Tensor:
    """Float32[m classes]: the logits of inputs, in eval mode.

    Raises:
        InputError: the model fails on such inputs, or returns no logits.
    """
    if isinstance(inputs, Tensor):
        return predict(model, inputs, batch_size=max(len(inputs), 1))
    device = next((one.device for one in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    with preserved(model), torch.no_grad():
        there: Any = {name: part.to(device) for name, part in inputs.items()}
        return logits_of(model, there).float().cpu()


def answers_to(model: nn.Module, examples: Examples, *, batch_size: int = 256) -> Tensor:
    """Float32[n classes], on the CPU: the logits of all examples. Memory: a batch, beside the result."""
    if isinstance(examples, TrainingSet):
        return predict(model, examples.images, batch_size=batch_size).cpu()
    return torch.cat([answers_of(model, inputs).cpu() for inputs, *_ in examples.in_batches(batch_size)])
