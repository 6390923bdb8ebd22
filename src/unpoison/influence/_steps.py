"""`in_steps`: what torch computes at once, so that each weight's inputs and output gradients can be read.

That is attention, recurrent layers, `nn.Bilinear`, and parameters without a layer of their own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from unpoison.influence._attention import attention_in_steps
from unpoison.influence._bare import carried
from unpoison.influence._diagonal_layers import BilinearProduct, is_bilinear
from unpoison.influence._recurrent import recurrent_in_steps


@contextlib.contextmanager
def in_steps(model: nn.Module, packed: dict[int, nn.Module]) -> Iterator[None]:
    """Within the block the model computes the same numbers, up to rounding, through the modules `packed`.

    Arguments:
        model: any network; left as it was.
        packed: the module to call for a weight, by the `id` of the weight.
    """
    with (
        attention_in_steps(model, packed),
        recurrent_in_steps(model, packed),
        _bilinear_in_steps(model, packed),
        carried(model, packed),
    ):
        yield


@contextlib.contextmanager
def _bilinear_in_steps(model: nn.Module, packed: dict[int, nn.Module]) -> Iterator[None]:
    changed = []
    try:
        for module in model.modules():
            held = packed.get(id(module._parameters.get("weight")))
            if is_bilinear(module) and "forward" not in vars(module) and isinstance(held, BilinearProduct):
                object.__setattr__(module, "forward", _BilinearSteps(held))
                changed.append(module)
        yield
    finally:
        for module in changed:
            object.__delattr__(module, "forward")


class _BilinearSteps:
    """The forward of one `nn.Bilinear`."""

    def __init__(self, product: nn.Module) -> None:
        self.product = product

    def __call__(self, input1: Tensor, input2: Tensor) -> Tensor:
        output: Tensor = self.product(torch.cat([input1, input2], -1))
        return output
