"""What loops of training share: the first network, the batches of an epoch, and the end of a diverged run."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unpoison._seeds import generator
from unpoison.data import TrainingSet, augment
from unpoison.models import build, whiten
from unpoison.training._recipe import Recipe

_IMAGES_FOR_WHITENING = 5000


def initial_network(training_set: TrainingSet, recipe: Recipe, *, seed: int) -> nn.Module:
    """The recipe's network, freshly initialised on the CPU, normalised for and fitted to the training set."""
    channels, height, width = training_set.image_shape
    network = build(
        recipe.model,
        num_classes=training_set.num_classes,
        in_channels=channels,
        image_size=(height, width),
        width=recipe.width,
        seed=seed,
        normalization=training_set.channel_statistics,
    )
    return whitened(network, training_set)


def whitened(network: nn.Module, training_set: TrainingSet) -> nn.Module:
    """The network, on the CPU, after its layers that are fitted to images have been."""
    whiten(network, training_set.batch(0, _IMAGES_FOR_WHITENING)[0].cpu())
    return network


def epoch_order(alive: Tensor, *, seed: int, epoch: int) -> Tensor:
    """Int64[m]: the indices where Bool[n] `alive` holds, shuffled for `epoch`; on the device of `alive`.

    Drawn on the CPU, so that the order is the same on every device.
    """
    chosen = alive.nonzero().squeeze(1)
    shuffle = torch.randperm(len(chosen), generator=generator(seed, "epoch", epoch, "order"))
    return chosen[shuffle.to(alive.device)]


def batch_bounds(count: int, batch_size: int) -> list[tuple[int, int]]:
    """Start and stop of each batch over `count` examples.

    The last batch may be smaller; a last batch of a single example is joined to the one before, since batch
    norm cannot train on one.

    >>> batch_bounds(7, 3), batch_bounds(8, 3), batch_bounds(1, 3)
    ([(0, 3), (3, 7)], [(0, 3), (3, 6), (6, 8)], [(0, 1)])
    """
    starts = list(range(0, count, batch_size))
    if len(starts) > 1 and count - starts[-1] == 1 and batch_size > 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], count], strict=True))


def augmented(images: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Images [b c h w], as bytes or floats, as the recipe augments them."""
    return augment(
        images,
        flip=recipe.flip,
        crop_padding=recipe.crop_padding,
        cutout=recipe.cutout,
        generator=generator,
    )


def own_modes(network: nn.Module) -> list[bool] | None:
    """The mode of each module of a network that was given in training mode; None for one in eval mode."""
    return [module.training for module in network.modules()] if network.training else None


def in_training_mode(network: nn.Module, modes: list[bool] | None = None) -> None:
    """Put the network in training mode, in place, but for frozen batch norm.

    A batch norm layer that lies in a module of which every parameter is frozen (`requires_grad` is False)
    keeps its statistics and normalises by them: frozen parts compute what they computed before.

    Arguments:
        network: any.
        modes: from `own_modes`: how the caller trains it, such as with batch norm in eval mode.
    """
    network.train()
    for module, mode in zip(network.modules(), modes or (), strict=False):
        module.training = mode
    for module in network.modules():
        parameters = list(module.parameters())
        if parameters and not any(one.requires_grad for one in parameters):
            for part in module.modules():
                if isinstance(part, nn.modules.batchnorm._BatchNorm):
                    part.eval()


def diverged_step(losses: Tensor, network: nn.Module) -> int | None:
    """The first step whose loss is not finite; the last one where a parameter is not; None if all are finite.

    Arguments:
        losses: Float[steps], of one epoch.
        network: after the last step, whose update no loss follows.
    """
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        return int(bad[0])
    finite = torch.stack([parameter.isfinite().all() for parameter in network.parameters()])
    return None if bool(finite.all()) else len(losses) - 1
