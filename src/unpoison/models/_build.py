"""`build`: a freshly initialised network of the catalog, by name."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from torch import nn

from unpoison.errors import InputError
from unpoison.models._catalog import architecture
from unpoison.models._initialization import seeded_initialization
from unpoison.models._normalized import Normalized


def build(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    image_size: int | tuple[int, int] = 32,
    width: int | None = None,
    seed: int,
    normalization: tuple[Sequence[float], Sequence[float]] | None = None,
) -> nn.Module:
    """A network with fresh parameters, on the CPU: Float[b c h w] in, logits Float[b classes] out.

    Arguments:
        name: one of `names()`.
        num_classes: how many logits, at least two.
        in_channels: channels of the images.
        image_size: height and width, one number for both or a pair.
        width: channels of the first convolution; None takes the published width.
        seed: of the initialisation; the global random state is neither read nor changed.
        normalization: mean and standard deviation of each channel for images in [0, 1]; the result is then a
            `Normalized`, whose network has the module path `network`. None leaves the images as they are.

    Raises:
        InputError: an unknown name, or a number out of range.

    >>> model = build("convnet-bn", num_classes=10, seed=0)
    >>> sum(parameter.numel() for parameter in model.parameters())
    70618
    """
    entry = architecture(name)
    where = f"build({name!r})"
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    width = entry.width if width is None else width
    for what, value, least in (
        ("num_classes", num_classes, 2),
        ("in_channels", in_channels, 1),
        ("width", width, 1),
        ("image_size", min(size), entry.smallest_image),
    ):
        if value < least:
            raise InputError(f"{where}: {what} must be at least {least}, found {value}")
    options = {
        "num_classes": num_classes,
        "in_channels": in_channels,
        "width": width,
        **entry.options,
        **({"image_size": size} if entry.fixed_size else {}),
    }
    if normalization is not None and len(normalization[0]) != in_channels:
        raise InputError(
            f"{where}: normalization has {len(normalization[0])} means for {in_channels} channels"
        )
    module, _, network = entry.network.partition(":")
    kind = getattr(importlib.import_module(f"unpoison.models.{module}"), network)
    with seeded_initialization(seed):
        model: nn.Module = kind(**options)
        return model if normalization is None else Normalized(model, *normalization)
