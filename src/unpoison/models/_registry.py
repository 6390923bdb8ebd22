"""`build`: a fresh network of the zoo, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from torch import nn

from unpoison.errors import InputError
from unpoison.models._catalog import architecture
from unpoison.models._convnet import ConvNet
from unpoison.models._fastnet import FastNet
from unpoison.models._initialization import seeded_initialization
from unpoison.models._mobilenet_v2 import MobileNetV2
from unpoison.models._normalized import Normalized
from unpoison.models._resnet import ResNet
from unpoison.models._resnet9 import ResNet9
from unpoison.models._vgg import VGG

# (classes, channels, (height, width), channels of the first convolution) -> the network without
# normalisation.
Builder = Callable[[int, int, tuple[int, int], int], nn.Module]


def _convnet(*, batch_norm: bool) -> Builder:
    return lambda classes, channels, size, width: ConvNet(
        num_classes=classes, in_channels=channels, image_size=size, width=width, batch_norm=batch_norm
    )


def _resnet(*blocks: int, imagenet_stem: bool = False) -> Builder:
    return lambda classes, channels, size, width: ResNet(
        num_classes=classes, in_channels=channels, width=width, blocks=blocks, imagenet_stem=imagenet_stem
    )


def _vgg(depth: int, *, batch_norm: bool = True) -> Builder:
    return lambda classes, channels, size, width: VGG(
        num_classes=classes, in_channels=channels, width=width, depth=depth, batch_norm=batch_norm
    )


BUILDERS: Final[Mapping[str, Builder]] = MappingProxyType(
    {
        "convnet": _convnet(batch_norm=False),
        "convnet-bn": _convnet(batch_norm=True),
        "fastnet": lambda classes, channels, size, width: FastNet(
            num_classes=classes, in_channels=channels, width=width
        ),
        "mobilenet-v2": lambda classes, channels, size, width: MobileNetV2(
            num_classes=classes, in_channels=channels, width=width
        ),
        "resnet18": _resnet(2, 2, 2, 2),
        "resnet18-imagenet": _resnet(2, 2, 2, 2, imagenet_stem=True),
        "resnet20": _resnet(3, 3, 3),
        "resnet9": lambda classes, channels, size, width: ResNet9(
            num_classes=classes, in_channels=channels, width=width
        ),
        "vgg11": _vgg(11),
        "vgg13": _vgg(13),
        "vgg13-plain": _vgg(13, batch_norm=False),
        "vgg16": _vgg(16),
    }
)


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
    """A network of the zoo with fresh parameters, on the CPU: Float[b c h w] in, logits Float[b classes] out.

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
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    width = entry.width if width is None else width
    for what, value, least in (
        ("num_classes", num_classes, 2),
        ("in_channels", in_channels, 1),
        ("width", width, 1),
        ("image_size", min(size), entry.smallest_image),
    ):
        if value < least:
            raise InputError(f"build({name!r}): {what} must be at least {least}, found {value}")
    if normalization is not None and len(normalization[0]) != in_channels:
        raise InputError(
            f"build({name!r}): normalization has {len(normalization[0])} means for {in_channels} channels"
        )
    with seeded_initialization(seed):
        network = BUILDERS[name](num_classes, in_channels, size, width)
        return network if normalization is None else Normalized(network, *normalization)
