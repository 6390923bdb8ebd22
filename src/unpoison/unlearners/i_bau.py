"""I-BAU: the network unlearns the worst trigger that can be found, with the trigger's answer accounted for.

Zeng, Chen, Park, Mao, Jin and Jia 2022, "Adversarial Unlearning of Backdoors via Implicit Hypergradient"
(ICLR, arXiv 2110.03735). Over clean examples x with labels y,

    min_theta max_delta  mean cross-entropy(f_theta(x + delta), y),   the norm of delta at most C:

delta is one perturbation for all inputs, a trigger that is not known. Each round:

1. from zero, delta is raised by steps along the gradient, one a batch, and put back into the ball;
2. a step of theta along the gradient of the loss at delta, including how delta depends on theta: with one
   step of ascent P(delta, theta) = delta + eta grad_delta, v <- (dP/ddelta)^T v + grad_delta H is iterated
   `fixed_points` times, and the hypergradient is grad_theta H + (dP/dtheta)^T v.

It needs no findings: the clean examples are the reference that is given, or the examples to keep, of which
`examples` are drawn.

Cost: for each round one pass over the clean examples for the trigger and, a batch, `fixed_points` + 3 forward
and backward passes. Memory: two copies of the network, and the graph of a second derivative of one batch.

Departures: batch norm keeps its statistics throughout, and the network that is returned is the one of the
last round.

Limits: inputs must be a tensor of floats. A trigger that is not additive (a warp) is only met as far as an
additive one resembles it. Too many rounds cost accuracy, like adversarial training.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from unpoison._inputs import placed
from unpoison._option_checks import NonNegativeFloat, PositiveFloat, PositiveInt
from unpoison._seeds import generator
from unpoison._stable import cross_entropy
from unpoison.data import Examples
from unpoison.errors import InputError, TrainingDivergedError
from unpoison.models import logits_of, precision_of
from unpoison.training import EpochRecord
from unpoison.unlearners._methods import register
from unpoison.unlearners._unlearner import Healed, Request, Unlearner, on_device, record_of


@final
@register(
    name="i-bau",
    title="I-BAU",
    summary="Unlearns the strongest universal perturbation of clean examples, by implicit hypergradients.",
    paper="Zeng et al. 2022, arXiv 2110.03735",
    cost="some fifty epochs over at most 1,000 clean examples",
    needs_findings=False,
    uses_reference=True,
)
@dataclass(frozen=True, kw_only=True)
class IBAU(Unlearner):
    """Implicit Backdoor Adversarial Unlearning.

    Arguments:
        rounds: of ascent and descent, 1 or more.
        norm: C, the greatest 2-norm of the perturbation, in units of the inputs (of images, from 0 to 1).
        ascent_rate: of a step of the perturbation, above 0.
        penalty: the weight of the squared norm in the ascent, 0 or more.
        fixed_points: steps of the fixed-point iteration, 1 or more.
        inner_rate: eta of the map whose fixed point the perturbation is, above 0.
        learning_rate: of Adam, by which the network is changed, above 0.
        batch_size: clean examples a step.
        examples: how many of the clean examples are used, drawn at random, at most.
        lose_classes: allow that a class is left without examples.

    Raises:
        InputError: a value is out of its range.
    """

    any_examples: ClassVar[bool] = True
    rounds: PositiveInt = 5
    norm: PositiveFloat = 10.0
    ascent_rate: PositiveFloat = 10.0
    penalty: NonNegativeFloat = 0.001
    fixed_points: PositiveInt = 5
    inner_rate: PositiveFloat = 0.1
    learning_rate: PositiveFloat = 0.001
    batch_size: PositiveInt = 128
    examples: PositiveInt = 1000
    lose_classes: bool = False

    def _heal(self, request: Request) -> Healed:
        clean = request.clean
        if len(clean) > self.examples:
            draw = torch.randperm(len(clean), generator=generator(request.seed, "i-bau", "examples"))
            clean = on_device(clean.subset(draw[: self.examples].sort().values), request.device)
        network = request.trainable().eval()
        trained = [one for one in network.parameters() if one.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=self.learning_rate)
        history: list[EpochRecord] = []
        for number in range(self.rounds):
            begun = time.perf_counter()
            trigger = self._trigger(network, clean, request, number)
            for images, labels in self._batches(clean, request, number, "descent"):
                gradients = hypergradient(
                    network,
                    trained,
                    images,
                    labels,
                    trigger,
                    rate=self.inner_rate,
                    penalty=self.penalty,
                    steps=self.fixed_points,
                )
                for parameter, gradient in zip(trained, gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
            if not all(bool(one.isfinite().all()) for one in trained):
                raise TrainingDivergedError(
                    f"i-bau: diverged in round {number}: a parameter is not finite; lower learning_rate "
                    f"({self.learning_rate:g})"
                )
            record = record_of(network, clean, epoch=number, learning_rate=self.learning_rate, started=begun)
            record.tell(request.progress, self.rounds)
            history.append(record)
        return request.healed(network, history)

    def _trigger(self, network: nn.Module, clean: Examples, request: Request, number: int) -> Tensor:
        """One perturbation for all inputs that raises their loss, within the ball."""
        trigger: Tensor | None = None
        for images, labels in self._batches(clean, request, number, "ascent"):
            if trigger is None:
                trigger = torch.zeros_like(images[0])
            given = trigger.requires_grad_()
            loss = cross_entropy(logits_of(network, images + given), labels)
            [gradient] = torch.autograd.grad(loss - self.penalty * given.square().sum(), given)
            moved = given.detach() + self.ascent_rate * gradient
            trigger = moved * (self.norm / moved.norm().clamp(min=1e-12)).clamp(max=1)
        assert trigger is not None
        return trigger.detach()

    def _batches(
        self, clean: Examples, request: Request, number: int, part: str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(clean), generator=generator(request.seed, "i-bau", number, part))
        precision = precision_of(request.network)
        for inputs, labels in clean.in_batches(self.batch_size, order):
            images = placed(inputs, request.device)
            if not isinstance(images, Tensor) or not images.is_floating_point():
                raise InputError("i-bau: adds a perturbation to the inputs, which must be a tensor of floats")
            yield images.to(precision), labels.to(request.device)


def hypergradient(
    network: nn.Module,
    parameters: list[nn.Parameter],
    images: Tensor,
    labels: Tensor,
    trigger: Tensor,
    *,
    rate: float,
    penalty: float,
    steps: int,
) -> list[Tensor]:
    """The gradient of the loss at the trigger in the parameters, as the trigger follows them.

    Arguments:
        network: in eval mode.
        parameters: those to differentiate in.
        images: Float[b ...].
        labels: Int64[b].
        trigger: Float[...], added to every image; taken for a fixed point of one step of ascent.
        rate: of that step.
        penalty: the weight of the trigger's squared norm in the ascent.
        steps: of the fixed-point iteration.

    Returns:
        One tensor a parameter, in its shape.
    """
    given = trigger.clone().requires_grad_()
    loss = cross_entropy(logits_of(network, images + given), labels)
    direct = torch.autograd.grad(loss, [given, *parameters], create_graph=True, allow_unused=True)
    slope = direct[0]
    assert slope is not None
    # One step of ascent, as a function of the trigger and of the parameters.
    moved = given + rate * (slope - 2 * penalty * given)
    outer = slope.detach()
    vector = outer.clone()
    for _ in range(steps):
        [turned] = torch.autograd.grad(moved, given, grad_outputs=vector, retain_graph=True)
        vector = turned + outer
    indirect = torch.autograd.grad(moved, parameters, grad_outputs=vector, allow_unused=True)
    return [
        (torch.zeros_like(one) if here is None else here.detach()) + (0 if there is None else there)
        for one, here, there in zip(parameters, direct[1:], indirect, strict=True)
    ]
