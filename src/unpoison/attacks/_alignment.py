"""`Alignment`: how far the gradient of poisons points where the adversary wants, and how to bend it.

The loss is `1 - cos(g_t, g_p)`, one cosine over all parameters of a network together (Geiping et al. 2021,
arXiv 2009.02276, equation 3), averaged over networks: `g_t` is the gradient that the adversary would like
training to follow, `g_p` the gradient of the mean loss of the poisons under the labels they bear. Networks
are in evaluation mode, as published, so an example's gradient does not depend on its neighbours in the batch.

Micro-batches are exact. `g_p` is a mean over examples, so the derivative of the loss by one example's pixels
is `<u, d g_p / d x>`, where `u`, the derivative of the loss by `g_p`, needs only the value of `g_p`. So the
poisons go through the network in pieces small enough for a cache, each with its own graph; when the last one
is summed, `<u, g_p>` is differentiated piece by piece. Where the graphs of all pieces would be too much, a
first pass sums `g_p` without a graph, and a second one has the graph of one piece at a time.

Cost a call and network: a forward, a backward and a double backward pass of the poisons (about three times a
training step); one more training step where graphs are not held. Nothing is computed for derivatives by the
parameters, which a plain `loss.backward()` would also fill in. Memory: the graphs of the poisons that are
held, or else of one piece, and three numbers a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unpoison.errors import InputError

Gradient = tuple[Tensor, ...]
View = Callable[[Tensor, int], Tensor]
"""What a network sees of Float[b c h w] poisons, the first of which is number `int`: an augmented copy."""


def unchanged(images: Tensor, start: int) -> Tensor:
    """The view without augmentation."""
    return images


def trained_parameters(network: nn.Module) -> tuple[nn.Parameter, ...]:
    """The parameters whose gradients are matched: those that require one.

    Raises:
        InputError: there are none.
    """
    parameters = tuple(parameter for parameter in network.parameters() if parameter.requires_grad)
    if not parameters:
        raise InputError(
            "surrogate: none of its parameters requires a gradient, so there is nothing to match"
        )
    return parameters


def gradient_of(network: nn.Module, loss: Tensor, *, graph: bool = False) -> Gradient:
    """The derivative of a scalar by all trained parameters; zeros where it does not depend on one."""
    parameters = trained_parameters(network)
    found = torch.autograd.grad(loss, parameters, create_graph=graph, allow_unused=True)
    return tuple(
        torch.zeros_like(one) if part is None else part for part, one in zip(found, parameters, strict=True)
    )


@final
class Alignment:
    """The matching loss for given networks and the gradients wanted of them.

    Arguments:
        networks: in evaluation mode; they are only read.
        wanted: for each network its `g_t`.
        micro_batch: poisons in a piece.
        held: of how many poisons the graphs are held together; more of them take two passes.
    """

    def __init__(
        self, networks: Sequence[nn.Module], wanted: Sequence[Gradient], *, micro_batch: int, held: int = 512
    ) -> None:
        self.networks = tuple(networks)
        self.micro_batch = micro_batch
        self.held = held
        self._directions = [_unit(one) for one in wanted]

    def loss(self, images: Tensor, labels: Tensor) -> float:
        """The loss of Float[n c h w] poisons in [0, 1] with labels Int64[n], without augmentation."""
        total = 0.0
        for network, direction in zip(self.networks, self._directions, strict=True):
            total += 1 - _cosine(direction, self._summed(network, images, labels, unchanged))
        return total / len(self.networks)

    def differentiate(self, images: Tensor, labels: Tensor, view: View = unchanged) -> tuple[float, Tensor]:
        """The loss, and its derivative by the images, Float[n c h w].

        `view` is called once or twice for each piece of the poisons and has to give the same view each time.
        """
        slope = torch.zeros_like(images)
        total = 0.0
        for network, direction in zip(self.networks, self._directions, strict=True):
            starts = range(0, len(images), self.micro_batch)
            pieces: list[tuple[Tensor, Gradient]] = []
            if len(images) <= max(self.held, self.micro_batch):
                pieces = [self._piece(network, images, labels, start, view) for start in starts]
                summed = [
                    torch.stack([part.detach() for part in parts]).sum(0)
                    for parts in zip(*(gradient for _, gradient in pieces), strict=True)
                ]
            else:
                summed = self._summed(network, images, labels, view)
            cosine = _cosine(direction, summed)
            pull = _pull(direction, summed, cosine)
            for start in reversed(starts):
                # The graph of a piece is freed as it is used.
                leaf, gradient = pieces.pop() if pieces else self._piece(network, images, labels, start, view)
                slope[start : start + self.micro_batch] += torch.autograd.grad(gradient, leaf, pull)[0]
            total += 1 - cosine
        return total / len(self.networks), slope.div_(len(self.networks))

    def _piece(
        self, network: nn.Module, images: Tensor, labels: Tensor, start: int, view: View
    ) -> tuple[Tensor, Gradient]:
        """The pixels of one piece and its part of `g_p`, which depends on them."""
        rows = slice(start, start + self.micro_batch)
        leaf = images[rows].detach().requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(network(view(leaf, start)), labels[rows], reduction="sum") / len(images)
            parts = gradient_of(network, loss, graph=True)
        # A parameter that the loss does not depend on has a constant gradient, which has no derivative.
        return leaf, tuple(part if part.requires_grad else part + 0 * leaf.sum() for part in parts)

    def _summed(self, network: nn.Module, images: Tensor, labels: Tensor, view: View) -> list[Tensor]:
        summed = [torch.zeros_like(parameter) for parameter in trained_parameters(network)]
        for start in range(0, len(images), self.micro_batch):
            rows = slice(start, start + self.micro_batch)
            with torch.enable_grad():
                seen = view(images[rows].detach(), start)
                loss = F.cross_entropy(network(seen), labels[rows], reduction="sum") / len(images)
                parts = gradient_of(network, loss)
            for total, part in zip(summed, parts, strict=True):
                total += part
        return summed


def _norm(parts: Sequence[Tensor]) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(part) for part in parts]))
    return norm


def _unit(parts: Gradient) -> Gradient:
    norm = _norm(parts)
    if not bool(norm > 0) or not bool(norm.isfinite()):
        raise InputError(
            f"surrogate: the gradient to match has length {float(norm):g}; the surrogate does already what "
            "the adversary wants, or its outputs are not finite"
        )
    return tuple(part / norm for part in parts)


def _cosine(direction: Gradient, gradient: Sequence[Tensor]) -> float:
    product = torch.stack([(a * b).sum() for a, b in zip(direction, gradient, strict=True)]).sum()
    return float(product / _norm(gradient).clamp(min=1e-30))


def _pull(direction: Gradient, gradient: Sequence[Tensor], cosine: float) -> list[Tensor]:
    """The derivative of `1 - cos` by `g_p`."""
    norm = _norm(gradient).clamp(min=1e-30)
    return [
        cosine / norm.square() * part - towards / norm
        for towards, part in zip(direction, gradient, strict=True)
    ]
