"""The look-ahead of MetaPoison: K steps of SGD as a differentiable function of the poison (Huang et al. 2020,
arXiv 2004.00225, section 2.2 and algorithm 1).

    theta_0                 a surrogate as it stands
    theta_1                 after a step on a batch that holds poisons
    theta_2 .. theta_K      after steps on the next batches, which hold none
    L_adv(theta_1 .. K)     the adversarial loss on the target at the last depth, or averaged over all

The gradient of L_adv in the poisons' pixels is exact: every inner gradient is kept as a graph
(`create_graph`), and one more reverse pass goes through all of them. Everything works on a stack of M
networks at once, whose tensors carry a first dimension of M; with M = 1 it is the plain network.

Memory: the graphs of K + 1 forward and K backward passes of a batch, for the M networks of the stack.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from unpoison.attacks._batch_norm import with_quick_batch_norm
from unpoison.models import fastest_layout
from unpoison.training import Recipe

Tensors = dict[str, Tensor]


@final
class Stack:
    """M networks of one architecture as one function of their stacked parameters.

    Arguments:
        template: gives the architecture alone; its own parameters are never used.
    """

    def __init__(self, template: nn.Module) -> None:
        self.in_training = copy.deepcopy(template).train()
        self.in_evaluation = copy.deepcopy(template).eval()
        self.alone = with_quick_batch_norm(copy.deepcopy(template).train())
        self._layout: torch.memory_format | None = None

    def __call__(
        self,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        images: Tensor,
        *,
        train: bool,
        once: bool = False,
    ) -> Tensor:
        """Logits Float[M b classes] of Float[M b c h w].

        Arguments:
            parameters: Float[M ...] by name.
            buffers: [M ...] by name.
            images: one batch a network.
            train: batch norm uses the batch's statistics and updates `buffers` in place.
            once: what comes is differentiated once at most. Channels last is then up to three times
                quicker on a CPU, while second derivatives are quicker in the plain layout.
        """
        module = self.in_evaluation
        if train:
            module = self.alone if len(images) == 1 and images.device.type == "cpu" else self.in_training

        def one(parameters: Tensors, buffers: Tensors, images: Tensor) -> Tensor:
            logits: Tensor = functional_call(module, {**parameters, **buffers}, (images,))
            return logits

        if len(images) == 1:
            alone = [{name: value[0] for name, value in group.items()} for group in (parameters, buffers)]
            if once:
                if self._layout is None:
                    self._layout = fastest_layout(self.in_evaluation, images[0].detach())
                alone[0] = {name: _laid_out(value, self._layout) for name, value in alone[0].items()}
                return one(alone[0], alone[1], _laid_out(images[0], self._layout)).unsqueeze(0)
            return one(alone[0], alone[1], images[0]).unsqueeze(0)
        stacked: Tensor = torch.func.vmap(one, randomness="different")(
            dict(parameters), dict(buffers), images
        )
        return stacked


@final
@dataclass(frozen=True)
class InnerStep:
    """One step of the recipe's SGD, the same as `torch.optim.SGD` takes, differentiable in everything.

    Arguments:
        recipe: momentum, Nesterov's form, weight decay, the rate of biases and label smoothing come from it.
        rates: Float[M], the learning rate of each network.
    """

    recipe: Recipe
    rates: Tensor

    def __call__(
        self, parameters: Mapping[str, Tensor], momenta: Mapping[str, Tensor], gradients: Sequence[Tensor]
    ) -> tuple[Tensors, Tensors]:
        """The parameters and momenta after the step; momenta are empty where the recipe has none."""
        recipe, moved, kept = self.recipe, Tensors(), Tensors()
        for (name, value), gradient in zip(parameters.items(), gradients, strict=True):
            factor, decay = 1.0, recipe.weight_decay
            if value.ndim <= 2:  # norms and biases: one dimension, and that of the stack
                factor = recipe.bias_learning_rate_factor
                decay = decay / factor if recipe.decay_norm_and_bias and factor else 0.0
            direction = gradient + decay * value if decay else gradient
            if recipe.momentum:
                kept[name] = recipe.momentum * momenta[name] + direction
                direction = direction + recipe.momentum * kept[name] if recipe.nesterov else kept[name]
            moved[name] = value - (factor * self.rates).view(-1, *[1] * (value.ndim - 1)) * direction
        return moved, kept


@final
@dataclass(frozen=True, kw_only=True)
class LookAhead:
    """What one look ahead found; tensors belong to a graph that leads back to the poison.

    Arguments:
        loss: Float[M], the adversarial loss of each network.
        logits: Float[M m classes] of the m targets after the last step, detached.
    """

    loss: Tensor
    logits: Tensor


def _laid_out(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    return tensor.contiguous(memory_format=layout) if tensor.ndim == 4 else tensor


def training_loss(logits: Tensor, labels: Tensor, recipe: Recipe) -> Tensor:
    """The sum over the stack of each network's mean cross-entropy: Float[M b classes], Int64[M b]."""
    losses = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none", label_smoothing=recipe.label_smoothing
    )
    return losses.view(labels.shape).mean(1).sum()


def look_ahead(
    stack: Stack,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    momenta: Mapping[str, Tensor],
    batches: Sequence[tuple[Tensor, Tensor]],
    targets: Tensor,
    objective: Callable[[Tensor], Tensor],
    step: InnerStep,
    *,
    depths: Literal["all", "last"] = "all",
    target_in_batch: bool = True,
) -> LookAhead:
    """Take K steps of SGD and say what the adversary would think of each.

    Arguments:
        stack: the networks' architecture.
        parameters: Float[M ...] by name, where the steps start; never changed.
        buffers: running statistics and whatever else is not trained; never changed.
        momenta: of SGD; empty where the recipe has none.
        batches: K + 1 pairs of images Float[M b c h w] and labels Int64[M b]. The first holds the poisons,
            and the graph that leads to them; the others are clean. The last is only seen by batch norm, and
            with `target_in_batch` alone.
        targets: Float[m c h w] in [0, 1].
        objective: Float[M m classes] to the adversarial loss Float[M].
        step: the inner optimiser.
        depths: take the loss as the mean over theta_1 .. theta_K ("all", as the public code does), or at
            theta_K ("last", as algorithm 1 says).
        target_in_batch: the targets join every batch, so that batch norm sees both together and the training
            loss ignores them (as the public code does); otherwise they are looked at in evaluation mode,
            with the running statistics of theta_0, which do not depend on the poisons.
    """
    parameters = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    # Statistics that the steps gather are their own: the surrogate has not taken these steps.
    gathered = {name: value.clone() for name, value in buffers.items()}
    aims = targets.expand(len(step.rates), *targets.shape)
    losses: list[Tensor] = []
    logits = targets.new_empty(0)
    for depth, (images, labels) in enumerate(batches):
        last = depth == len(batches) - 1
        if target_in_batch:
            outputs = stack(parameters, gathered, torch.cat([images, aims], 1), train=True, once=last)
            batch_logits, logits = torch.split(outputs, [labels.shape[1], len(targets)], 1)
        elif depth:
            logits = stack(parameters, buffers, aims, train=False, once=True)
        if depth and (last or depths == "all"):
            losses.append(objective(logits))
        if last:
            break
        if not target_in_batch:
            batch_logits = stack(parameters, gathered, images, train=True)
        loss = training_loss(batch_logits, labels, step.recipe)
        gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        parameters, momenta = step(parameters, momenta, gradients)
    return LookAhead(loss=torch.stack(losses).mean(0), logits=logits.detach())
