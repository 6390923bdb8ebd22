"""Where victims of transfer learning start: a pretrained network, with a new last layer where that is needed.

A frozen extractor is used in eval mode and its last layer alone is trained, by the ordinary trainer, so that
every defense works as it does elsewhere. On the CPU the features of images that come again (in training
without augmentation they all do) are kept, so that a victim costs one forward pass over its set.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Final, Self, final

import torch
from torch import Tensor, nn

from unpoison._artefacts import digest
from unpoison._seeds import derive_seed
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.models import build
from unpoison.training import Recipe, Trained

_MOST_FEATURES: Final = 50_000


def starting_network(
    start: Trained, training_set: TrainingSet, recipe: Recipe, *, seed: int, freeze: bool
) -> nn.Module:
    """The network that a training by `recipe` begins with.

    Where the classes of `training_set` are not those of `start`, and where everything else is to `freeze`, it
    has a new last layer, initialised from `seed`.

    Raises:
        InputError: the architectures differ, or the network does not end with a linear layer.
    """
    if not freeze and start.class_names == training_set.class_names:
        return start.model
    channels, height, width = training_set.image_shape
    network = build(
        recipe.model,
        num_classes=training_set.num_classes,
        in_channels=channels,
        image_size=(height, width),
        width=recipe.width,
        seed=derive_seed(seed, "last layer"),
        normalization=((0.0,) * channels, (1.0,) * channels),
    )
    last = _last_layer(network)
    own = network.state_dict()
    state = {
        name: own[name] if name.startswith(f"{last}.") else value
        for name, value in start.model.state_dict().items()
    }
    try:
        network.load_state_dict(state)
    except RuntimeError:
        assert start.recipe is not None
        names = f"{start.recipe.model} and {recipe.model}"
        raise InputError(f"pretraining: {names} are different networks") from None
    network = network.to(training_set.device).eval()
    if not freeze:
        return network
    frozen, (images, _) = FrozenExtractor(network), training_set.batch(0, 2)
    with torch.no_grad():
        if not torch.allclose(network(images), frozen(images), atol=1e-5):
            raise InputError(f"pretraining: freeze: {recipe.model} does not end with its last linear layer")
    return frozen


def finished(trained: Trained) -> Trained:
    """What is stored of a victim: a network that its recipe builds again."""
    model = trained.model
    network = model.whole() if isinstance(model, FrozenExtractor) else model
    return dataclasses.replace(trained, model=network, own_model=False)


@final
class FrozenExtractor(nn.Module):
    """A network that ends with a linear layer, which alone is trained."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.path: str = _last_layer(network)
        self.layer = network.get_submodule(self.path)
        self.body = copy.deepcopy(network).requires_grad_(False).eval()
        self.body.set_submodule(self.path, nn.Identity())
        self.known: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Self:
        """The extractor stays in eval mode."""
        super().train(mode)
        self.body.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Float[b classes]: logits of Float[b c h w] images."""
        logits: Tensor = self.layer(self._features(images))
        return logits

    def whole(self) -> nn.Module:
        """The network with the layer in its place."""
        network = copy.deepcopy(self.body).requires_grad_(True)
        network.set_submodule(self.path, copy.deepcopy(self.layer))
        return network.eval()

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        keys = [digest(image.numpy().tobytes()) for image in images.contiguous()] if images.is_cpu else []
        fresh = [place for place, key in enumerate(keys) if key not in self.known]
        if not keys or len(self.known) + len(fresh) > _MOST_FEATURES:
            features: Tensor = self.body(images)
            return features
        if fresh:
            self.known.update(zip([keys[place] for place in fresh], self.body(images[fresh]), strict=True))
        return torch.stack([self.known[key] for key in keys])


def _last_layer(network: nn.Module) -> str:
    paths: list[str] = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not paths:
        raise InputError("pretraining: the network has no linear layer to replace")
    return paths[-1]
