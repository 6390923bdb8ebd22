"""The importance of parameters to examples, and the dampening of parameters by it.

The importance of a parameter is the mean over examples of its squared gradient, the diagonal of the empirical
Fisher matrix. It is a mean over single examples: the square of a batch's mean gradient, which public code
uses, is smaller by a factor between 1 and the batch size that differs between parameters, and so are ratios
of two importances. That approximation is there for published presets (`per_example=False`).

Cost: exact, one forward and backward pass and one gradient of all parameters an example, computed for a few
examples at a time, or one after the other where torch cannot compute a network so; approximate, a forward and
a backward pass. Memory: the importances, one number a parameter, and `workspace_bytes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from unpoison._inputs import Inputs, differentiable, placed, rows_of
from unpoison._memory import is_allocation_failure
from unpoison._stable import cross_entropy
from unpoison.data import Examples
from unpoison.errors import InputError, TrainingDivergedError
from unpoison.models import device_of, fastest_layout, logits_in, logits_of, precision_of, preserved

Importances = dict[str, Tensor]
"""By the name of the parameter, in its shape; 0 or more."""

Value = Callable[[Tensor, Tensor], Tensor]
_FAILURES = (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError, LookupError)


def cross_entropy_of_each(logits: Tensor, labels: Tensor) -> Tensor:
    """Float[b]: the loss of each example."""
    return cross_entropy(logits, labels, reduction="none")


def logit_norm(logits: Tensor, labels: Tensor) -> Tensor:
    """Float[b]: the Euclidean norm of the logits (Foster et al. 2024, arXiv 2402.19308)."""
    length: Tensor = torch.linalg.vector_norm(logits, dim=1)
    return length


def importances(
    network: nn.Module,
    examples: Examples,
    *,
    value: Value = cross_entropy_of_each,
    power: Literal[1, 2] = 2,
    per_example: bool = True,
    batch_size: int = 128,
    workspace_bytes: int | None = None,
    method: str,
) -> Importances:
    """The mean of |gradient of `value`|^`power` over the examples, for every parameter that is not frozen.

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
        InputError: every parameter is frozen.
        TrainingDivergedError: a gradient is not finite.
    """
    if isinstance(network, nn.DataParallel):  # which cannot be called with other parameters
        inner = importances(
            network.module,
            examples,
            value=value,
            power=power,
            per_example=per_example,
            batch_size=batch_size,
            workspace_bytes=workspace_bytes,
            method=method,
        )
        return {f"module.{name}": one for name, one in inner.items()}
    parameters = {
        name: parameter.detach() for name, parameter in network.named_parameters() if parameter.requires_grad
    }
    if not parameters:
        raise InputError(f"{method}: every parameter is frozen (requires_grad is False); unfreeze some")
    totals = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    if per_example:
        count = sum(parameter.numel() * parameter.itemsize for parameter in parameters.values())
        if workspace_bytes is None:
            workspace_bytes = 64 << 20 if device_of(network).type == "cpu" else 1 << 30
        batch_size = max(1, min(batch_size, workspace_bytes // max(count, 1)))
    of_examples = _of_examples(network, value) if per_example else None
    batches, device = 0, device_of(network)
    layout = fastest_layout(network, examples.batch(0, 2)[0])
    with preserved(network), torch.enable_grad():
        for start in range(0, len(examples), batch_size):
            inputs, labels = examples.batch(start, min(start + batch_size, len(examples)))
            inputs = _laid_out(differentiable(placed(inputs, device)), precision_of(network), layout)
            labels = labels.to(device).clone()  # it may have been made under inference_mode
            found: Importances | None = None
            if of_examples is not None:
                try:
                    found = of_examples(parameters, rows_of(inputs, (slice(None), None)), labels[:, None])
                except _FAILURES as error:
                    if is_allocation_failure(error):
                        raise
                    of_examples = None  # torch cannot compute this network for several examples at once
            step = 1 if per_example else len(labels)
            parts = [slice(place, place + step) for place in range(0, len(labels), step)]
            for part in parts if found is None else parts[:1]:
                one = found or _of_mean(network, value, list(parameters), rows_of(inputs, part), labels[part])
                for name, each in one.items():
                    totals[name] += (each.square() if power == 2 else each.abs()).sum(0)
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

    In place; frozen parameters are left as they are. Parameters without a gradient are not selected.

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
            if name not in own:
                continue
            chosen = own[name] > selection * reference[name]
            factor = (dampening * reference[name] / own[name]).clamp(max=1)
            parameter.mul_(torch.where(chosen, factor, torch.ones_like(factor)))
            selected = selected.to(parameter.device) + chosen.sum()
    return int(selected)


def ratios(own: Importances, reference: Importances) -> Tensor:
    """Float[m]: the finite own / reference of all parameters, in ascending order."""
    found = torch.cat([(own[name] / reference[name]).flatten() for name in own])
    return found[found.isfinite()].sort().values


def _of_examples(network: nn.Module, value: Value) -> Callable[..., Importances]:
    """From parameters, inputs and labels, [b 1 ...], to the gradient of each example, [b ...]."""
    buffers = dict(network.named_buffers())

    def mean(parameters: Mapping[str, Tensor], inputs: Inputs, labels: Tensor) -> Tensor:
        tensors = {**parameters, **buffers}
        if isinstance(inputs, Tensor):
            output = functional_call(network, tensors, (inputs,))
        else:
            output = functional_call(network, tensors, (), dict(inputs))
        return value(logits_in(output), labels).mean()

    gradients: Callable[..., Importances] = vmap(grad(mean), in_dims=(None, 0, 0), randomness="error")
    return gradients


def _of_mean(
    network: nn.Module, value: Value, names: list[str], inputs: Inputs, labels: Tensor
) -> Importances:
    """The gradient of the mean of `value`, [1 ...]; zero for parameters that it does not depend on."""
    parameters = [network.get_parameter(name) for name in names]
    mean = value(logits_of(network, inputs), labels).mean()
    found = torch.autograd.grad(mean, parameters, allow_unused=True, materialize_grads=True)
    return {name: one[None] for name, one in zip(names, found, strict=True)}


def _laid_out(inputs: Inputs, precision: torch.dtype, layout: torch.memory_format) -> Inputs:
    """Floats in the precision of the network, images in the layout that is fastest."""
    if not isinstance(inputs, Tensor):
        return {name: one.to(precision) if one.is_floating_point() else one for name, one in inputs.items()}
    inputs = inputs.to(precision) if inputs.is_floating_point() else inputs
    return inputs.contiguous(memory_format=layout) if inputs.ndim == 4 else inputs
