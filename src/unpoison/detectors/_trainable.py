"""What detectors share that train a copy of the model: the copy, orders of examples, and answers checked."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from unpoison._seeds import generator
from unpoison.data import Examples
from unpoison.detectors._answers import answers_to
from unpoison.errors import InputError
from unpoison.models import preserved


def trainable_copy(model: nn.Module) -> nn.Module:
    """A copy of which every parameter of floating point is trained."""
    with preserved(model), torch.no_grad():
        network = copy.deepcopy(model)
    for parameter in network.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
        parameter.grad = None
    return network


def random_order(seed: int, *names: str | int, count: int) -> Tensor:
    """Int64[count]: the numbers below `count`, shuffled for the consumer called `names`."""
    return torch.randperm(count, generator=generator(seed, *names))


def finite_answers(model: nn.Module, examples: Examples, batch_size: int) -> Tensor:
    """Float32[n classes], on the CPU: the logits of all examples.

    Raises:
        InputError: one of them is not finite.
    """
    logits = answers_to(model, examples, batch_size=batch_size)
    if not bool(torch.isfinite(logits).all()):
        row = int((~torch.isfinite(logits)).any(1).nonzero()[0])
        raise InputError(
            f"{examples.name}: the features of example {row} in the last layer are not finite numbers; train "
            "the model anew, or lower learning_rate"
        )
    return logits
