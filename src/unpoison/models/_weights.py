"""Weights from a safetensors file into a network, through the prefixes that trainers put before the names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from unpoison.errors import InputError

_OWN_PREFIXES = ("module.", "_orig_mod.")


def load_weights(network: nn.Module, path: Path, *, where: str) -> None:
    """Load a safetensors file into the network.

    The names may have a prefix, such as `module.` of DataParallel, `model.` of Lightning, `_orig_mod.` of
    torch.compile or that of a larger checkpoint, in the file or in the network; what lies beside it in the
    file is not read.

    Arguments:
        network: gets the weights, in place.
        path: the file. Nothing is ever unpickled: a checkpoint of torch.save must be converted.
        where: begins the messages.

    Raises:
        InputError: the file cannot be read, lacks a tensor of the network, has one of another shape or one
            that the network has not, or holds the whole network under several prefixes.
    """
    if not path.is_file():
        raise InputError(f"{where}: no such file")
    try:
        stored = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{where}: cannot be read as safetensors ({error})") from None
    state = network.state_dict()
    weights = _fitting(stored, state, where)
    # A tensor that is shared is stored once, under one of its names; a count of batches decides nothing.
    shared = {state[name].data_ptr() for name in weights if name in state}
    for name, tensor in state.items():
        if name not in weights:
            if name.endswith("num_batches_tracked") or (tensor.numel() and tensor.data_ptr() in shared):
                continue
            raise InputError(f"{where}: lacks {name!r}, which the model has")
        if weights[name].shape != tensor.shape:
            raise InputError(
                f"{where}: {name!r} has shape {tuple(weights[name].shape)}, the model's has "
                f"{tuple(tensor.shape)}"
            )
    unknown = sorted(set(weights) - set(state))
    if unknown:
        raise InputError(f"{where}: holds {unknown[0]!r}, which the model does not have")
    network.load_state_dict(weights, strict=False)


def _fitting(stored: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The stored tensors by the network's own names."""
    own = ""
    for prefix in _OWN_PREFIXES if state else ():
        while all(name.startswith(own + prefix) for name in state):
            own += prefix
    if not own and set(stored) & set(state):
        return dict(stored)
    inner = {name.removeprefix(own) for name in state if not name.endswith("num_batches_tracked")}
    if not inner:
        return dict(stored)
    longest = max(inner, key=len)
    prefixes = [
        name.removesuffix(longest) for name in stored if name == longest or name.endswith(f".{longest}")
    ]
    whole = [one for one in prefixes if all(one + name in stored for name in inner)]
    if len(whole) > 1:
        raise InputError(
            f"{where}: holds the model under {len(whole)} prefixes ({', '.join(sorted(whole))}); keep one"
        )
    if not prefixes:
        return dict(stored)
    prefix = (whole or prefixes)[0]
    return {
        own + name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)
    }
