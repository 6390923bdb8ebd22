"""The look-ahead of MetaPoison: K steps of SGD as a differentiable function of the poisons.

Huang et al. 2020, arXiv 2004.00225, section 2.2 and algorithm 1:

    theta_0                 the present parameters of a surrogate
    theta_1                 after a step on a batch with poisons
    theta_2 .. theta_K      after steps on the next batches, which have none
    L_adv(theta_1 .. K)     the adversarial loss on the targets at theta_K, or averaged over all steps

The gradient of L_adv in the poisons' pixels is exact: every inner gradient is kept as a graph
(`create_graph`), and one more reverse pass goes through all of them. Everything works on M networks at once,
whose tensors have a first dimension of M; with M = 1 this is the plain network.

Memory: the graphs of K + 1 forward and K backward passes of a batch, for the M networks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from unpoison._stable import cross_entropy
from unpoison.attacks.metapoison.batch_norm import with_fast_batch_norm
from unpoison.models import fastest_layout, logits_in
from unpoison.training import Recipe

Tensors = dict[str, Tensor]


@final
class StackedNetwork:
    """M networks of one architecture as one function of their stacked parameters.

    Arguments:
        template: gives the architecture alone; its own parameters are not used.
    """

    def __init__(self, template: nn.Module) -> None:
        self._training = copy.deepcopy(template).train()
        self._evaluation = copy.deepcopy(template).eval()
        self._single = with_fast_batch_norm(copy.deepcopy(template).train())
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
            images: one batch for each network.
            train: batch norm uses the batch's statistics and updates `buffers` in place.
            once: the result is differentiated at most once. Channels last is then up to three times faster on
                a CPU, while second derivatives are faster in the default layout.
        """
        module = self._evaluation
        if train:
            module = self._single if len(images) == 1 and images.device.type == "cpu" else self._training

        def one(parameters: Tensors, buffers: Tensors, images: Tensor) -> Tensor:
            return logits_in(functional_call(module, {**parameters, **buffers}, (images,)))

        if len(images) > 1:
            stacked: Tensor = torch.func.vmap(one, randomness="different")(
                dict(parameters), dict(buffers), images
            )
            return stacked
        own, rest = ({name: value[0] for name, value in group.items()} for group in (parameters, buffers))
        if not once:
            return one(own, rest, images[0]).unsqueeze(0)
        if self._layout is None:
            self._layout = fastest_layout(self._evaluation, images[0].detach())
        own = {name: _laid_out(value, self._layout) for name, value in own.items()}
        return one(own, rest, _laid_out(images[0], self._layout)).unsqueeze(0)


@final
@dataclass(frozen=True)
class SGDStep:
    """One step of the recipe's SGD, the same as that of `torch.optim.SGD`, differentiable in everything.

    Arguments:
        recipe: of which momentum, Nesterov's form, weight decay and the rate of biases are used.
        rates: Float[M], the learning rate of each network.
    """

    recipe: Recipe
    rates: Tensor

    def __call__(
        self, parameters: Mapping[str, Tensor], momenta: Mapping[str, Tensor], gradients: Sequence[Tensor]
    ) -> tuple[Tensors, Tensors]:
        """The parameters and momenta after the step; momenta are empty if the recipe has no momentum."""
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
    """The result of a look-ahead.

    Arguments:
        loss: Float[M], the adversarial loss of each network, with the graph that leads back to the poisons.
        logits: Float[M m classes] of the m targets after the last step, detached.
    """

    loss: Tensor
    logits: Tensor


def look_ahead(
    network: StackedNetwork,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    momenta: Mapping[str, Tensor],
    batches: Sequence[tuple[Tensor, Tensor]],
    targets: Tensor,
    objective: Callable[[Tensor], Tensor],
    step: SGDStep,
    *,
    loss_steps: Literal["all", "last"] = "all",
    target_in_batch: bool = True,
) -> LookAhead:
    """Take K steps of SGD and evaluate the adversarial loss after each.

    Arguments:
        network: the networks' architecture.
        parameters: Float[M ...] by name, theta_0; never changed.
        buffers: running statistics and whatever else is not trained; never changed.
        momenta: of SGD; empty if the recipe has no momentum.
        batches: K + 1 pairs of images Float[M b c h w] and labels Int64[M b]. The first contains the poisons,
            with the graph that leads to them; the others are clean. The last is used by batch norm alone, and
            only with `target_in_batch`.
        targets: Float[m c h w] in [0, 1].
        objective: from Float[M m classes] to the adversarial loss Float[M].
        step: the inner optimiser.
        loss_steps: the loss is the mean over theta_1 .. theta_K ("all", as in the public code), or that at
            theta_K ("last", as in algorithm 1).
        target_in_batch: the targets are appended to every batch, so that they share its statistics of batch
            norm, and left out of the training loss (as in the public code); otherwise they are evaluated with
            the running statistics of theta_0, which do not depend on the poisons.
    """
    parameters = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    # The statistics that the steps update are copies: the surrogate itself does not take these steps.
    updated = {name: value.clone() for name, value in buffers.items()}
    targets = targets.expand(len(step.rates), *targets.shape)
    losses: list[Tensor] = []
    logits = targets.new_empty(0)
    for depth, (images, labels) in enumerate(batches):
        last = depth == len(batches) - 1
        if target_in_batch:
            outputs = network(parameters, updated, torch.cat([images, targets], 1), train=True, once=last)
            batch_logits, logits = torch.split(outputs, [labels.shape[1], targets.shape[1]], 1)
        elif depth:
            logits = network(parameters, buffers, targets, train=False, once=True)
        if depth and (last or loss_steps == "all"):
            losses.append(objective(logits))
        if last:
            break
        if not target_in_batch:
            batch_logits = network(parameters, updated, images, train=True)
        loss = training_loss(batch_logits, labels, step.recipe)
        gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        parameters, momenta = step(parameters, momenta, gradients)
    return LookAhead(loss=torch.stack(losses).mean(0), logits=logits.detach())


def training_loss(logits: Tensor, labels: Tensor, recipe: Recipe) -> Tensor:
    """The sum over M networks of the mean cross-entropy of logits Float[M b classes], labels Int64[M b]."""
    losses = cross_entropy(logits, labels, reduction="none", label_smoothing=recipe.label_smoothing)
    return losses.mean(1).sum()


def _laid_out(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    return tensor.contiguous(memory_format=layout) if tensor.ndim == 4 else tensor
