"""A forward pass of any network on images, and the logits in what it returns.

Networks differ in the precision of their parameters, in their device, and in what they return: a tensor, a
tuple that begins with the logits, a mapping or an object that has `logits`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unpoison.errors import InputError


def device_of(model: nn.Module, default: torch.device | str = "cpu") -> torch.device:
    """Where the parameters of the model lie; `default` for a model without any."""
    found = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), None)
    return torch.device(default) if found is None else found


def as_input(model: nn.Module, images: Tensor, layout: torch.memory_format) -> Tensor:
    """Images as `forward` wants them: on the model's device, in `layout`, Float[b c h w] in [0, 1].

    Arguments:
        model: any network.
        images: UInt8[b c h w], or Float[b c h w] in [0, 1].
        layout: from `fastest_layout`.
    """
    moved = images.to(device_of(model, images.device), memory_format=layout)
    return moved.float().div_(255) if moved.dtype == torch.uint8 else moved


def forward(model: nn.Module, images: Tensor) -> Any:
    """What the model returns for Float[b c h w] `images`, given in the precision of its parameters.

    Raises:
        InputError: the model fails on such images.
    """
    precision = next((one.dtype for one in model.parameters() if one.is_floating_point()), images.dtype)
    try:
        return model(images.to(precision))
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise
        raise InputError(
            f"model: fails on {precision} images of shape {tuple(images.shape[1:])}: {_first_line(error)}"
        ) from error


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Float[b classes]: the logits of Float[b c h w] `images`, in the precision of the model.

    Raises:
        InputError: the model fails on such images, or what it returns holds no logits.

    >>> class Pair(nn.Module):
    ...     def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
    ...         return images.flatten(1), images
    >>> logits_of(Pair(), torch.zeros(1, 2, 1, 1)).shape
    torch.Size([1, 2])
    """
    return logits_in(forward(model, images))


def logits_in(output: Any) -> Tensor:
    """The logits in what a network returned.

    Raises:
        InputError: there are none.
    """
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, tuple | list) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        raise InputError(
            f"model: returns a {type(output).__name__} without logits; expected a tensor, a tuple that "
            "begins with one, or an object with `logits`"
        )
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
