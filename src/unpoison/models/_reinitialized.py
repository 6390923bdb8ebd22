"""`reinitialized`: the same architecture with fresh parameters, for networks whose layers can be reset."""

from __future__ import annotations

import copy

import torch
from torch import nn

from unpoison.errors import InputError
from unpoison.models._initialization import seeded_initialization


def reinitialized(model: nn.Module, *, seed: int) -> nn.Module:
    """A copy of `model`, on the same device, with freshly initialised parameters and running statistics.

    Every module that holds parameters of its own must have `reset_parameters`, as torch's layers do. Inner
    modules are reset before the modules that contain them. Buffers of modules without parameters (the mean of
    a normalisation) are kept. The global random state is not changed.

    Arguments:
        model: left as it is.
        seed: of the new parameters; equal seeds give equal parameters on every device.

    Raises:
        InputError: names the first module that holds parameters and cannot reset them.

    >>> from unpoison.models import build
    >>> model = build("resnet9", num_classes=2, width=2, seed=0)
    >>> again = reinitialized(model, seed=1)
    """
    fresh = copy.deepcopy(model)
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    device = devices.pop() if len(devices) == 1 else None
    if devices:
        raise InputError("reinitialized: the model lies on several devices; move it to one first")
    with seeded_initialization(seed), torch.no_grad():
        # Drawn on the CPU: the numbers then depend on the seed alone and no other generator moves.
        fresh.cpu()
        for path, module in reversed(list(fresh.named_modules())):
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
            elif next(module.parameters(recurse=False), None) is not None:
                raise InputError(
                    f"reinitialized: module {path or '(the model itself)'!r} ({type(module).__name__}) holds "
                    "parameters but has no reset_parameters method; give it one or pass a freshly built model"
                )
    return fresh if device is None else fresh.to(device)
