"""`preserved` and `usual_mode`: evaluate a model alike from everywhere, and leave it exactly as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model is in eval mode and its parameters have no `.grad`.

    When the block ends, also by an error, the mode of every module, `requires_grad` and `.grad` of every
    parameter and all hooks are what they were before. Values of parameters and buffers are not restored (in
    eval mode batch norm does not change its statistics).

    >>> from torch import nn
    >>> model = nn.Linear(2, 2)
    >>> with preserved(model) as same:
    ...     print(same.training)
    False
    >>> model.training
    True
    """
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    hooks = [
        (registry, dict(registry))
        for module in model.modules()
        for registry in (getattr(module, name) for name in _HOOKS)
    ]
    try:
        model.eval()
        for parameter, _, _ in parameters:
            parameter.grad = None
        yield model
    finally:
        for registry, content in hooks:
            # In place: handles refer to these very dictionaries.
            registry.clear()
            registry.update(content)
        for parameter, requires_grad, gradient in parameters:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def usual_mode(device: torch.device) -> Iterator[None]:
    """Within the block neither `inference_mode` nor autocast of the caller is on.

    Tensors that are made inside can be differentiated, and numbers have the precision of the model.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for kind in {device.type, "cpu"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield
