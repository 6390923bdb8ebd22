"""`fastest_layout`: the memory layout of images that suits a network."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from unpoison._inputs import Inputs
from unpoison.errors import InputError
from unpoison.models._forward import as_input, forward
from unpoison.models._preserved import preserved

_SAFE_CHANNELS: Final = 8


def fastest_layout(model: nn.Module, images: Inputs) -> torch.memory_format:
    """Channels last where the network has convolutions and accepts that layout; else contiguous.

    Channels last makes convolutions two to four times as fast on a CPU. Networks that flatten their maps with
    `view` fail on it, so it is tried: one forward pass of two images, in eval mode. The result also depends
    on the layout of the parameters, so lay those out first.

    Arguments:
        model: any network; left as it was.
        images: UInt8[n c h w], or Float[n c h w] in [0, 1], such as the network will be given; inputs of
            another shape are contiguous.

    >>> flattening = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2))
    >>> fastest_layout(flattening, torch.rand(2, 3, 8, 8))
    torch.channels_last
    >>> fastest_layout(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), torch.rand(2, 3, 8, 8))
    torch.contiguous_format
    """
    if (
        not isinstance(images, Tensor)
        or images.ndim != 4
        or not len(images)
        or not any(isinstance(module, nn.Conv2d) for module in model.modules())
        or any(map(_is_unsafe, model.modules()))
    ):
        return torch.contiguous_format
    some = as_input(model, images[:2], torch.preserve_format)
    with preserved(model), torch.no_grad():
        try:
            # A clone, since one channel has both layouts at once and would not be moved.
            forward(model, some.clone(memory_format=torch.channels_last))
        except InputError:
            # An error of another cause comes again in the caller's own forward pass, and is reported there.
            return torch.contiguous_format
    return torch.channels_last


def _is_unsafe(module: nn.Module) -> bool:
    """Whether channels last may write past the end of a gradient: oneDNN 3.12, of torch 2.13, with AVX2.

    That of the inputs of a 1x1 convolution with a stride and fewer than eight input channels.
    """
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride != (1, 1)
        and module.in_channels < _SAFE_CHANNELS
    )


def laid_out(model: nn.Module, layout: torch.memory_format) -> nn.Module:
    """The model with its parameters and buffers of four dimensions in `layout`, in place."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.ndim == 4:
                tensor.data = tensor.data.to(memory_format=layout)
    return model
