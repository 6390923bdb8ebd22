"""The architectures: name, class, published width and source; free of torch, so cheap to read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from types import MappingProxyType
from typing import Any, Final, final

from unpoison.errors import InputError, nearest


@final
@dataclass(frozen=True)
class Architecture:
    """What is known of an architecture before it is built.

    Arguments:
        network: its module in this package and its class, as "module:class".
        source: where the architecture comes from.
        width: channels of the first convolution as published; all other layers scale with it.
        options: what else its class is given.
        smallest_image: the least height and width that survive its pooling.
        fixed_size: whether its class needs the size of the images.
    """

    network: str
    source: str
    _: KW_ONLY
    width: int = 64
    options: Mapping[str, Any] = field(default_factory=dict)
    smallest_image: int = 8
    fixed_size: bool = False


ARCHITECTURES: Final[Mapping[str, Architecture]] = MappingProxyType(
    {
        "convnet": Architecture(
            "_convnet:ConvNet",
            "the ConvNet of MetaPoison (Huang et al. 2020), no batch norm",
            width=16,
            options={"batch_norm": False},
            fixed_size=True,
        ),
        "convnet-bn": Architecture(
            "_convnet:ConvNet", "the ConvNetBN of MetaPoison (Huang et al. 2020)", width=16, fixed_size=True
        ),
        "fastnet": Architecture("_fastnet:FastNet", "after airbench94 (Jordan 2024)", smallest_image=9),
        "mobilenet-v2": Architecture(
            "_mobilenet_v2:MobileNetV2", "Sandler et al. 2018, strides for CIFAR", width=32
        ),
        "resnet18": Architecture(
            "_resnet:ResNet",
            "He et al. 2016, stem for CIFAR: 3x3, no pooling",
            options={"blocks": (2, 2, 2, 2)},
        ),
        "resnet18-imagenet": Architecture(
            "_resnet:ResNet",
            "He et al. 2016, stem for ImageNet: 7x7/2 and pooling",
            options={"blocks": (2, 2, 2, 2), "imagenet_stem": True},
        ),
        "resnet20": Architecture(
            "_resnet:ResNet",
            "He et al. 2016, section 4.2, projection shortcuts",
            width=16,
            options={"blocks": (3, 3, 3)},
        ),
        "resnet9": Architecture("_resnet9:ResNet9", "the DAWNBench network of Page 2018"),
        "vgg11": Architecture(
            "_vgg:VGG", "Simonyan and Zisserman 2015, configuration A, batch norm", options={"depth": 11}
        ),
        "vgg13": Architecture(
            "_vgg:VGG", "Simonyan and Zisserman 2015, configuration B, batch norm", options={"depth": 13}
        ),
        "vgg13-plain": Architecture(
            "_vgg:VGG",
            "configuration B without batch norm, global max-pool (MetaPoison)",
            options={"depth": 13, "batch_norm": False},
        ),
        "vgg16": Architecture(
            "_vgg:VGG", "Simonyan and Zisserman 2015, configuration D, batch norm", options={"depth": 16}
        ),
    }
)


def names() -> tuple[str, ...]:
    """The names that `build` and `Recipe.model` accept, sorted.

    >>> "resnet9" in names()
    True
    """
    return tuple(sorted(ARCHITECTURES))


def architecture(name: str) -> Architecture:
    """The architecture of that name.

    Raises:
        InputError: there is none; the message names the nearest.
    """
    if name not in ARCHITECTURES:
        raise InputError(f"model: there is no architecture {name!r}; {nearest(str(name), names())}")
    return ARCHITECTURES[name]
