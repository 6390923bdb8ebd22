"""`activations_of`: how much memory the activations of a network take, measured on two examples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from unpoison._inputs import Inputs, count_of, placed
from unpoison.models._forward import device_of, forward
from unpoison.models._preserved import preserved, usual_mode


@final
@dataclass(frozen=True)
class Activations:
    """Bytes that a pass through a network takes for each example of a batch.

    Arguments:
        kept: what a forward pass keeps for its backward pass.
        largest: inputs and outputs of the module that has the largest.
    """

    kept: float
    largest: float

    def reading(self, batch: int) -> float:
        """Bytes of a forward pass of a batch without gradients."""
        return batch * 2 * self.largest

    def training(self, batch: int) -> float:
        """Bytes of a forward and a backward pass of a batch."""
        return batch * (self.kept + 2 * self.largest)


def activations_of(model: nn.Module, inputs: Inputs) -> Activations:
    """Measure the activations of a network by a forward pass of `inputs`, of which a few examples will do.

    Arguments:
        model: in any mode; left as it was.
        inputs: as the network takes them.

    Raises:
        InputError: the model fails on such inputs.
    """
    count, device = count_of(inputs), device_of(model)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    largest = 0

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a node that kept its own output would never be freed

    def measure(_: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        nonlocal largest
        largest = max(largest, sum(one.nbytes for one in (*_tensors(given), *_tensors(output))))

    # Hooks do not trace: a compiled network is measured as it was before.
    with usual_mode(device), preserved(model), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        for module in model.modules():
            if next(module.children(), None) is None:
                module.register_forward_hook(measure)
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.is_inference():
                parameter.requires_grad_(True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = forward(model, placed(inputs, device))  # keeps the graph while it is measured
        del output
    return Activations(sum(kept.values()) / count, largest / count)


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, tuple | list):
        for one in found:
            yield from _tensors(one)
