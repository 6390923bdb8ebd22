"""`InnerNetwork`: a network that an attack trains for itself, step by step beside what it crafts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor, nn

from unpoison._global_randomness import own_randomness
from unpoison._seeds import derive_seed
from unpoison.attacks._attack import CraftRequest
from unpoison.attacks._networks import fresh_copy, frozen
from unpoison.models import device_of


@final
class InnerNetwork:
    """The architecture of the first surrogate with new parameters, trained by SGD with momentum 0.9.

    Arguments:
        request: whose first surrogate is the template; it is left as it was.
        learning_rate: constant, above 0; the weight decay is 5e-4.

    Raises:
        InputError: there is no surrogate, or its parameters cannot be reset.
    """

    def __init__(self, request: CraftRequest, *, learning_rate: float) -> None:
        template, training_set = request.models[0], request.training_set
        self.device = device_of(template, training_set.device)
        copy = fresh_copy(template, training_set, seed=request.derived_seed("inner parameters"))
        self.network: nn.Module = copy.to(self.device).requires_grad_(True)
        self._optimizer = torch.optim.SGD(
            self.network.parameters(), lr=learning_rate, momentum=0.9, weight_decay=5e-4
        )
        self._seed, self._steps = request.derived_seed("inner randomness"), 0

    @contextmanager
    def training(self) -> Iterator[nn.Module]:
        """The network in training mode, for a forward pass, with random layers of its own."""
        self._steps += 1
        self.network.train()
        with own_randomness(self.device, seed=derive_seed(self._seed, self._steps)), torch.enable_grad():
            yield self.network

    def step(self, loss: Tensor) -> None:
        """One step of SGD down the loss, which is a scalar."""
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def frozen(self) -> Iterator[nn.Module]:
        """The network in eval mode, in which only inputs have gradients."""
        with frozen([self.network]):
            yield self.network


def batches(count: int, size: int, draws: torch.Generator) -> Iterator[Tensor]:
    """Int64[b], without end: batches of all examples in a random order, and again in another.

    >>> drawn = batches(5, 2, torch.Generator().manual_seed(0))
    >>> sorted(torch.cat([next(drawn) for _ in range(3)]).tolist())
    [0, 1, 2, 3, 4]
    """
    while True:
        yield from torch.split(torch.randperm(count, generator=draws), size)
