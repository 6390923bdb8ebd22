"""The catalog of architectures: names, published widths and sources; free of torch, so cheap to read."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, final

from unpoison.errors import InputError


@final
@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What is known of an architecture before it is built.

    Arguments:
        width: channels of the first convolution as published; every other layer scales with it.
        source: where the architecture comes from.
        smallest_image: the least height and width that survive its pooling.
    """

    width: int
    source: str
    smallest_image: int = 8


ARCHITECTURES: Final[Mapping[str, Architecture]] = MappingProxyType(
    {
        "convnet": Architecture(
            width=16, source="the ConvNet of MetaPoison (Huang et al. 2020), no batch norm"
        ),
        "convnet-bn": Architecture(width=16, source="the ConvNetBN of MetaPoison (Huang et al. 2020)"),
        "fastnet": Architecture(
            width=64, source="in the manner of airbench94 (Jordan 2024)", smallest_image=9
        ),
        "mobilenet-v2": Architecture(width=32, source="Sandler et al. 2018, strides for CIFAR"),
        "resnet18": Architecture(width=64, source="He et al. 2016, stem for CIFAR: 3x3, no pooling"),
        "resnet18-imagenet": Architecture(
            width=64, source="He et al. 2016, stem for ImageNet: 7x7/2 and pooling"
        ),
        "resnet20": Architecture(width=16, source="He et al. 2016, section 4.2, projection shortcuts"),
        "resnet9": Architecture(width=64, source="the DAWNBench net of Page 2018"),
        "vgg11": Architecture(width=64, source="Simonyan and Zisserman 2015, configuration A, batch norm"),
        "vgg13": Architecture(width=64, source="Simonyan and Zisserman 2015, configuration B, batch norm"),
        "vgg13-plain": Architecture(
            width=64, source="configuration B without batch norm, global max-pool (MetaPoison)"
        ),
        "vgg16": Architecture(width=64, source="Simonyan and Zisserman 2015, configuration D, batch norm"),
    }
)


def names() -> tuple[str, ...]:
    """The names that `build` and `Recipe.model` know, sorted.

    >>> "resnet9" in names()
    True
    """
    return tuple(sorted(ARCHITECTURES))


def architecture(name: str) -> Architecture:
    """The entry of `name`.

    Raises:
        InputError: no architecture bears that name; the message gives the nearest ones.
    """
    if name not in ARCHITECTURES:
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(names())}"
        raise InputError(f"model: there is no architecture {name!r}; {hint}")
    return ARCHITECTURES[name]
