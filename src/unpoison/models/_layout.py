"""`fastest_layout`: how images should lie in memory for a network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unpoison.models._preserved import preserved


def fastest_layout(model: nn.Module, images: Tensor) -> torch.memory_format:
    """Channels last where the network convolves and can take it; else contiguous.

    Channels last is two to four times as quick for convolutions on a processor. A network that flattens its
    maps with `view`, as the oldest examples do, cannot take it, so this asks: one forward pass of two images,
    in eval mode, after which the network is as it was. Its parameters may lie either way, and count: who lays
    them out channels last does so before he asks.

    Arguments:
        model: any network.
        images: UInt8[n c h w], or Float[n c h w] in [0, 1], some that the network will be given.

    >>> flattening = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2))
    >>> fastest_layout(flattening, torch.rand(2, 3, 8, 8))
    torch.channels_last
    >>> fastest_layout(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), torch.rand(2, 3, 8, 8))
    torch.contiguous_format
    """
    if (
        images.ndim != 4
        or not len(images)
        or not any(isinstance(module, nn.Conv2d) for module in model.modules())
    ):
        return torch.contiguous_format
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), images.device)
    some = images[:2].to(device)
    some = some.float().div_(255) if some.dtype == torch.uint8 else some
    with preserved(model), torch.no_grad():
        try:
            # A clone, since one channel lies both ways at once and would not be moved.
            model(some.clone(memory_format=torch.channels_last))
        except RuntimeError:
            # Whatever it was, if it was not the layout it comes again, where it can be told.
            return torch.contiguous_format
    return torch.channels_last
