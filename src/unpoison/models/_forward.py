"""A forward pass of any network, and the logits in what it returns.

Networks differ in what they take (a tensor, or a mapping of tensors that is passed by name), in the precision
of their parameters, in their device, and in what they return: a tensor, a tuple that begins with the logits,
a mapping or an object that has `logits`; one logit a class, or a single one for two classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unpoison._inputs import Inputs
from unpoison._memory import is_allocation_failure
from unpoison.errors import InputError, UnpoisonError

Values = Literal["logits", "probabilities"]
_FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AssertionError, AttributeError)


def device_of(model: nn.Module, default: torch.device | str = "cpu") -> torch.device:
    """Where the parameters of the model lie; `default` for a model without any."""
    found = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), None)
    return torch.device(default) if found is None else found


def precision_of(model: nn.Module, default: torch.dtype = torch.float32) -> torch.dtype:
    """The type of the model's first floating-point parameter; `default` for a model without any."""
    return next((one.dtype for one in model.parameters() if one.is_floating_point()), default)


def as_input(model: nn.Module, images: Tensor, layout: torch.memory_format) -> Tensor:
    """Images as `forward` wants them: on the model's device, in `layout`, Float[b c h w] in [0, 1].

    Arguments:
        model: any network.
        images: UInt8[b c h w], or Float[b c h w] in [0, 1].
        layout: from `fastest_layout`.
    """
    moved = images.to(device_of(model, images.device), memory_format=layout)
    return moved.float().div_(255) if moved.dtype == torch.uint8 else moved


def forward(model: nn.Module, inputs: Inputs) -> Any:
    """What the model returns for `inputs`; floats are given in the precision of its parameters.

    Raises:
        InputError: the model fails on such inputs.
    """
    given: dict[str, Tensor] = dict(inputs) if isinstance(inputs, Mapping) else {"": inputs}
    precision = precision_of(model, next(iter(given.values())).dtype)
    given = {name: one.to(precision) if one.is_floating_point() else one for name, one in given.items()}
    try:
        return model(**given) if isinstance(inputs, Mapping) else model(given[""])
    except _FAILURES as error:
        told = str(error)
        # What the training loop explains better.
        known = is_allocation_failure(error) or "more than 1 value per channel" in told
        if known or isinstance(error, UnpoisonError):
            raise
        kinds = ", ".join(
            f"{name} {one.dtype} inputs of shape {tuple(one.shape[1:])}".strip()
            for name, one in given.items()
        )
        raise InputError(f"model: fails on {kinds}: {_first_line(error)}") from error


def logits_of(
    model: nn.Module, inputs: Inputs, *, output: str | int | None = None, values: Values = "logits"
) -> Tensor:
    """Float[b classes]: the logits of `inputs`, in the precision of the model.

    Arguments:
        model: any network.
        inputs: such as Float[b c h w] images.
        output: the name or place of the logits in what the model returns; see `logits_in`.
        values: what the numbers are; see `logits_in`.

    Raises:
        InputError: the model fails on such inputs, or what it returns holds no logits.

    >>> class Pair(nn.Module):
    ...     def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
    ...         return images.flatten(1), images
    >>> logits_of(Pair(), torch.zeros(1, 2, 1, 1)).shape
    torch.Size([1, 2])
    """
    return logits_in(forward(model, inputs), output=output, values=values)


def logits_in(output_of_model: Any, *, output: str | int | None = None, values: Values = "logits") -> Tensor:
    """Float[b classes]: the logits in what a network returned.

    Arguments:
        output_of_model: a tensor; a mapping or an object with `logits`; a mapping with one tensor; or a tuple
            or list, of which the first tensor is taken.
        output: the key, attribute or place of the logits, where it is another one.
        values: what the numbers are; of "probabilities" the logarithms are logits.

    A single logit z, of shape [b] or [b 1], stands for two classes with the logits 0 and z.

    Raises:
        InputError: there are none.
    """
    found = _named(output_of_model, output) if output is not None else _guessed(output_of_model)
    if not isinstance(found, Tensor):
        what = f"no {output!r}" if output is not None else "nothing that is known to be logits"
        raise InputError(
            f"model: returns a {type(output_of_model).__name__} with {what}; expected a tensor, a tuple that "
            "begins with one, or a mapping or object with `logits`; else name the part of the logits by "
            "task=ClassificationTask(output=...)"
        )
    if found.ndim > 2 and all(size == 1 for size in found.shape[2:]):
        found = found.flatten(1)
    if found.ndim == 1:
        found = found[:, None]
    if found.ndim != 2:
        raise InputError(
            f"model: returns outputs of shape {tuple(found.shape[1:])} for an input; expected one logit "
            "a class"
        )
    if values == "probabilities":
        numbers = torch.finfo(found.dtype)
        if found.shape[1] == 1:
            found = torch.cat([1 - found, found], 1)
        return found.clamp(min=numbers.tiny).log()
    return torch.cat([torch.zeros_like(found), found], 1) if found.shape[1] == 1 else found


def _named(output_of_model: Any, output: str | int) -> Any:
    if isinstance(output, str) and not isinstance(output_of_model, Mapping):
        return getattr(output_of_model, output, None)
    try:
        return output_of_model[output]
    except (KeyError, IndexError, TypeError):
        return None


def _guessed(output_of_model: Any) -> Any:
    if isinstance(output_of_model, Tensor):
        return output_of_model
    if isinstance(output_of_model, Mapping):
        if "logits" in output_of_model:
            return output_of_model["logits"]
        tensors = [one for one in output_of_model.values() if isinstance(one, Tensor)]
        return tensors[0] if len(tensors) == 1 else None
    if hasattr(output_of_model, "logits"):
        return output_of_model.logits
    if isinstance(output_of_model, tuple | list):
        # Before the logits there may be a loss, or nothing in its place.
        return next((one for one in output_of_model if isinstance(one, Tensor) and one.ndim), None)
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
