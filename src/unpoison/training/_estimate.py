"""What training takes, estimated before the first step; refused with the batch size that would fit."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from unpoison._memory import check_memory
from unpoison.models import Activations, device_of


def training_bytes(network: nn.Module, activations: Activations, *, batch_size: int) -> Mapping[str, float]:
    """Bytes by what takes them, beside the network and the training set.

    Arguments:
        network: what is trained.
        activations: of it.
        batch_size: examples a step.
    """
    trained = sum(one.nbytes for one in network.parameters() if one.requires_grad)
    return {
        "gradients and momentum": 2 * trained,
        "activations": activations.training(batch_size),
    }


def check_training(
    what: str, network: nn.Module, activations: Activations, *, batch_size: int, more: Mapping[str, float]
) -> None:
    """Refuse a training that takes more memory than may be taken.

    Arguments:
        what: is about to start.
        network: what is trained.
        activations: of it.
        batch_size: examples a step.
        more: bytes of what else is held.

    Raises:
        InsufficientMemoryError: in one line, with a batch size that would fit.
    """

    def parts(size: int) -> dict[str, float]:
        return {**training_bytes(network, activations, batch_size=size), **more}

    def advice(allowed: int) -> str:
        size = batch_size
        while size > 1:
            size //= 2
            if sum(parts(size).values()) <= allowed:
                return f"batch_size={size} would fit"
        return "no batch_size makes it fit; take a narrower network, or a machine with more memory"

    check_memory(what, parts(batch_size), advice=advice, device=device_of(network))
