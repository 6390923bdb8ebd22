"""The importance of parameters to examples, and the dampening of parameters by it.

The importance of a parameter is the mean over examples of its squared gradient, the diagonal of the empirical
Fisher matrix. It is a mean over single examples: the square of a batch's mean gradient, which public code
uses, is smaller by a factor between 1 and the batch size that differs between parameters, and so are ratios
of two importances. That approximation is there for published presets (`per_example=False`).

Cost: exact, one forward and backward pass and one gradient of all parameters an example, computed for a few
examples at a time; approximate, a forward and a backward pass. Memory: the importances, one number a
parameter, and `workspace_bytes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from unpoison._stable import cross_entropy
from unpoison.data import TrainingSet
from unpoison.errors import InputError, TrainingDivergedError
from unpoison.models import fastest_layout, logits_in, preserved

Importances = dict[str, Tensor]
"""By the name of the parameter, in its shape; 0 or more."""

Value = Callable[[Tensor, Tensor], Tensor]


def cross_entropy_of_each(logits: Tensor, labels: Tensor) -> Tensor:
    """Float[b]: the loss of each example."""
    return cross_entropy(logits, labels, reduction="none")


def logit_norm(logits: Tensor, labels: Tensor) -> Tensor:
    """Float[b]: the Euclidean norm of the logits (Foster et al. 2024, arXiv 2402.19308)."""
    length: Tensor = torch.linalg.vector_norm(logits, dim=1)
    return length


def importances(
    network: nn.Module,
    examples: TrainingSet,
    *,
    value: Value = cross_entropy_of_each,
    power: Literal[1, 2] = 2,
    per_example: bool = True,
    batch_size: int = 128,
    workspace_bytes: int | None = None,
    method: str,
) -> Importances:
    """The mean of |gradient of `value`|^`power` over the examples, for every parameter.

    Arguments:
        network: on the device of the examples; evaluated in eval mode and left as it was.
        examples: read once, in order.
        value: of each example, from logits and labels.
        power: 2 for the diagonal of the Fisher matrix, 1 for absolute values, which are robust to outliers.
        per_example: over single examples, or over the gradients of the means of batches.
        batch_size: examples a batch.
        workspace_bytes: of single examples' gradients at a time; None is 64 MiB, on an accelerator 1 GiB.
        method: its name, for messages.

    Raises:
        InputError: the network cannot be differentiated example by example.
        TrainingDivergedError: a gradient is not finite.
    """
    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}
    totals = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    if per_example:
        count = sum(parameter.numel() * parameter.itemsize for parameter in parameters.values())
        if workspace_bytes is None:
            workspace_bytes = 64 << 20 if examples.device.type == "cpu" else 1 << 30
        batch_size = max(1, min(batch_size, workspace_bytes // max(count, 1)))
    gradients = _gradients(network, value, per_example=per_example)
    batches = 0
    layout = fastest_layout(network, examples.images)
    with preserved(network):
        network.requires_grad_(False)
        for start in range(0, len(examples), batch_size):
            images, labels = examples.batch(start, min(start + batch_size, len(examples)))
            images = images.to(next(iter(parameters.values())).dtype).contiguous(memory_format=layout)
            try:
                found = gradients(parameters, images, labels)
            except RuntimeError as error:
                if not per_example or isinstance(error, torch.OutOfMemoryError):
                    raise
                raise InputError(
                    f"{method}: the network cannot be differentiated example by example "
                    f"({str(error).splitlines()[0][:200]}); set per_example to False"
                ) from error
            for name, gradient in found.items():
                totals[name] += (gradient.square_() if power == 2 else gradient.abs_()).sum(0)
            batches += 1
    result = {name: total.div_(len(examples) if per_example else batches) for name, total in totals.items()}
    # One read for all parameters, since a read synchronises.
    finite = torch.stack([total.isfinite().all() for total in result.values()])
    if not bool(finite.all()):
        name = list(result)[int((~finite).nonzero()[0])]
        raise TrainingDivergedError(
            f"{method}: the gradient of parameter {name} is not finite; the model has diverged"
        )
    return result


def dampen(
    network: nn.Module,
    own: Importances,
    reference: Importances,
    *,
    selection: float | Tensor,
    dampening: float,
) -> int:
    """Multiply each parameter with own > selection * reference by min(1, dampening * reference / own).

    In place. Parameters without a gradient are not selected.

    Arguments:
        network: with the parameters of the importances.
        own: the importances to the examples to forget.
        reference: the importances to all examples, or to those that are kept.
        selection: alpha, how many times as important to be selected; a tensor holds one number.
        dampening: lambda.

    Returns:
        How many parameters were selected.
    """
    selected = torch.zeros((), dtype=torch.int64)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            chosen = own[name] > selection * reference[name]
            factor = (dampening * reference[name] / own[name]).clamp(max=1)
            parameter.mul_(torch.where(chosen, factor, torch.ones_like(factor)))
            selected = selected.to(parameter.device) + chosen.sum()
    return int(selected)


def ratios(own: Importances, reference: Importances) -> Tensor:
    """Float[m]: the finite own / reference of all parameters, in ascending order."""
    found = torch.cat([(own[name] / reference[name]).flatten() for name in own])
    return found[found.isfinite()].sort().values


def _gradients(
    network: nn.Module, value: Value, *, per_example: bool
) -> Callable[[Mapping[str, Tensor], Tensor, Tensor], dict[str, Tensor]]:
    """From parameters, images and labels to gradients: one for each example, or that of the mean, [1 ...]."""
    buffers = dict(network.named_buffers())

    def mean(parameters: Mapping[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        logits = logits_in(functional_call(network, {**parameters, **buffers}, (images,)))
        return value(logits, labels).mean()

    gradient = grad(mean)
    of_examples = vmap(gradient, in_dims=(None, 0, 0), randomness="error")

    def gradients(parameters: Mapping[str, Tensor], images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor]
        if per_example:
            found = of_examples(parameters, images[:, None], labels[:, None])
            return found
        found = gradient(parameters, images, labels)
        return {name: one[None] for name, one in found.items()}

    return gradients
