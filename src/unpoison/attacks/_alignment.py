"""`Alignment`: the matching loss of gradient matching and its gradient in the poisons' pixels.

The loss is `1 - cos(g_t, g_p)`, one cosine over all parameters of a network together (Geiping et al. 2021,
arXiv 2009.02276, equation 3), averaged over networks: `g_t` is the gradient that the adversary wants training
to follow, `g_p` the gradient of the mean loss of the poisons under their given labels. Networks are in
evaluation mode, as published, so an example's gradient does not depend on the rest of its batch.

Micro-batches are exact. `g_p` is a mean over examples, so the derivative of the loss in one example's pixels
is `<u, d g_p / d x>`, where `u`, the derivative of the loss in `g_p`, needs only the value of `g_p`. The
poisons therefore go through the network in pieces small enough for a cache, each with its own graph; when all
are summed, `<u, g_p>` is differentiated piece by piece. Where the graphs of all pieces would take too much
memory, a first pass sums `g_p` without a graph, and a second one builds the graph of one piece at a time.

Several alternatives (restarts) can go through together, each with a copy of the parameters to differentiate.

Cost of a call for each network: a forward, a backward and a double backward pass of the poisons (about three
training steps); one more training step where graphs are not held. No derivatives in the parameters are
computed, which a plain `loss.backward()` would also fill in. Memory: the graphs of the poisons that are held,
or else of one piece, and three numbers for each parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from unpoison._stable import cross_entropy
from unpoison.errors import InputError
from unpoison.models import logits_in, logits_of, precision_of

Gradient = tuple[Tensor, ...]
View = Callable[[Tensor, int], Tensor]
"""From Float[b c h w] poisons, and the number of the first of them, to their augmented copies."""


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
    """The gradient of a scalar in all trained parameters; zeros where it does not depend on one."""
    return _derivatives(loss, trained_parameters(network), graph=graph)


@final
class Alignment:
    """The matching loss for given networks and given gradients to match.

    Arguments:
        networks: in evaluation mode; they are only read.
        wanted: for each network its `g_t`.
        micro_batch: poisons in a piece.
        held: of how many poisons the graphs are held together; more poisons than that take two passes.
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
            total += 1 - float(_cosine(direction, self._summed(network, images[None], labels, (unchanged,))))
        return total / len(self.networks)

    def differentiate(self, images: Tensor, labels: Tensor, view: View = unchanged) -> tuple[float, Tensor]:
        """The loss, and its derivative in the images, Float[n c h w].

        `view` is called once or twice for each piece of the poisons and must return the same each time.
        """
        losses, slope = self.differentiate_together(images[None], labels, (view,))
        return losses[0], slope[0]

    def differentiate_together(
        self, images: Tensor, labels: Tensor, views: Sequence[View]
    ) -> tuple[list[float], Tensor]:
        """The losses of r alternatives, each with its view, and their derivatives Float[r n c h w].

        The same as one by one, but for rounding. This is faster on a GPU, one by one on a CPU.
        """
        slope = torch.zeros_like(images)
        totals = images.new_zeros(len(images))
        for network, direction in zip(self.networks, self._directions, strict=True):
            starts = range(0, images.shape[1], self.micro_batch)
            pieces: list[tuple[Tensor, Gradient]] = []
            if images.shape[1] <= max(self.held, self.micro_batch):
                pieces = [self._piece(network, images, labels, start, views) for start in starts]
                summed = [
                    torch.stack([part.detach() for part in parts]).sum(0)
                    for parts in zip(*(gradient for _, gradient in pieces), strict=True)
                ]
            else:
                summed = self._summed(network, images, labels, views)
            cosine = _cosine(direction, summed)
            pull = _pull(direction, summed, cosine)
            for start in reversed(starts):
                # The graph of a piece is freed once it is used.
                leaf, gradient = (
                    pieces.pop() if pieces else self._piece(network, images, labels, start, views)
                )
                slope[:, start : start + self.micro_batch] += torch.autograd.grad(gradient, leaf, pull)[0]
            totals += 1 - cosine
        return (totals / len(self.networks)).tolist(), slope.div_(len(self.networks))

    def _piece(
        self, network: nn.Module, images: Tensor, labels: Tensor, start: int, views: Sequence[View]
    ) -> tuple[Tensor, Gradient]:
        """The pixels of one piece and its part of every `g_p`, which depends on them."""
        rows = slice(start, start + self.micro_batch)
        leaf = images[:, rows].detach().requires_grad_()
        with torch.enable_grad():
            parts = _gradients(network, _seen(leaf, start, views), labels[rows], images.shape[1], graph=True)
        # A parameter that the loss does not depend on has a constant gradient, which has no derivative.
        return leaf, tuple(part if part.requires_grad else part + 0 * leaf.sum() for part in parts)

    def _summed(
        self, network: nn.Module, images: Tensor, labels: Tensor, views: Sequence[View]
    ) -> list[Tensor]:
        summed = [
            parameter.new_zeros(len(images), *parameter.shape) for parameter in trained_parameters(network)
        ]
        for start in range(0, images.shape[1], self.micro_batch):
            rows = slice(start, start + self.micro_batch)
            with torch.enable_grad():
                seen = _seen(images[:, rows].detach(), start, views)
                parts = _gradients(network, seen, labels[rows], images.shape[1], graph=False)
            for total, part in zip(summed, parts, strict=True):
                total += part
        return summed


def _seen(images: Tensor, start: int, views: Sequence[View]) -> Tensor:
    """The augmented copies of each alternative, Float[r m c h w]."""
    return torch.stack([view(one, start) for view, one in zip(views, images, strict=True)])


def _gradients(network: nn.Module, seen: Tensor, labels: Tensor, count: int, *, graph: bool) -> Gradient:
    """The part of `g_p` from m of `count` poisons, for each of r alternatives: [r ...] a parameter."""
    if len(seen) == 1:
        loss = cross_entropy(logits_of(network, seen[0]), labels, reduction="sum") / count
        return tuple(part[None] for part in gradient_of(network, loss, graph=graph))
    # Each alternative has its own copy of the parameters, so that gradients stay apart.
    own = {
        name: parameter.detach().expand(len(seen), *parameter.shape).requires_grad_()
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
    }
    shared = {name: one.detach() for name, one in network.named_parameters() if not one.requires_grad}
    shared |= dict(network.named_buffers())

    def answers(parameters: dict[str, Tensor], images: Tensor) -> Tensor:
        return logits_in(functional_call(network, {**shared, **parameters}, (images,)))

    logits = vmap(answers, randomness="different")(own, seen.to(precision_of(network)))
    loss = cross_entropy(logits, labels.expand(len(seen), -1), reduction="sum") / count
    return _derivatives(loss, tuple(own.values()), graph=graph)


def _derivatives(loss: Tensor, tensors: tuple[Tensor, ...], *, graph: bool) -> Gradient:
    """The derivative of a scalar in each tensor; zeros where it does not depend on one."""
    found = torch.autograd.grad(loss, tensors, create_graph=graph, allow_unused=True)
    return tuple(
        torch.zeros_like(one) if part is None else part for part, one in zip(found, tensors, strict=True)
    )


def _products(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Float[r]: inner products over all parameters together."""
    return torch.stack([(a * b).flatten(1).sum(1) for a, b in zip(first, second, strict=True)]).sum(0)


def _norms(parts: Sequence[Tensor]) -> Tensor:
    lengths = [torch.linalg.vector_norm(part.flatten(1), dim=1) for part in parts]
    norms: Tensor = torch.linalg.vector_norm(torch.stack(lengths), dim=0)
    return norms


def _unit(parts: Gradient) -> Gradient:
    """The gradient divided by its norm, [1 ...] a parameter."""
    alone = tuple(part[None] for part in parts)
    norm = _norms(alone)[0]
    if not bool(norm > 0) or not bool(norm.isfinite()):
        raise InputError(
            f"surrogate: the gradient to match has norm {float(norm):g}; the surrogate already does what the "
            "adversary wants, or its outputs are not finite"
        )
    return tuple(part / norm for part in alone)


def _cosine(direction: Gradient, gradient: Sequence[Tensor]) -> Tensor:
    """Float[r]."""
    return _products(direction, gradient) / _norms(gradient).clamp(min=1e-30)


def _pull(direction: Gradient, gradient: Sequence[Tensor], cosine: Tensor) -> list[Tensor]:
    """The derivative of each `1 - cos` in its `g_p`."""
    norm = _norms(gradient).clamp(min=1e-30)

    def each(numbers: Tensor, part: Tensor) -> Tensor:
        return numbers.view(-1, *[1] * (part.ndim - 1))

    # Divided twice, for the square of the norm of a small gradient would underflow.
    return [
        (each(cosine, part) * part / each(norm, part) - towards) / each(norm, part)
        for towards, part in zip(direction, gradient, strict=True)
    ]
