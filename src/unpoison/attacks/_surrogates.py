"""The surrogates of MetaPoison: M networks of staggered ages, trained on and born again when they come of age
(Huang et al. 2020, arXiv 2004.00225, algorithm 1).

Network m is first trained to epoch floor(m T / M). Every craft step trains each network for one epoch; one
that reaches epoch T starts again from new parameters, so that at any time the ensemble holds networks from
all of training. Everything that is drawn depends on the seed, the network's number, its life and its epoch
alone, so an ensemble restored from a checkpoint goes on bit for bit.

Networks are kept in stacks of equal size. A stack of one is trained like any network, its images channels
last; larger ones go through `vmap`, which pays on a GPU alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn

from unpoison._seeds import derive_seed, generator
from unpoison.attacks._unrolled import InnerStep, Stack, Tensors, training_loss
from unpoison.data import TrainingSet, augment
from unpoison.errors import InputError
from unpoison.models import build, reinitialized, whiten
from unpoison.training import Recipe, batch_bounds

_IMAGES_FOR_WHITENING = 5000


@final
@dataclass(frozen=True, kw_only=True)
class Upbringing:
    """How surrogates are born and raised.

    Arguments:
        training_set: the clean set, on the device where all work is done.
        templates: networks whose architectures (and, for fine-tuning, parameters) are taken in turn; empty
            for the recipe's own architecture.
        recipe: how they are trained.
        lifetime: T, the epochs after which a network starts again.
        pretrained: start each life from the template's parameters instead of new ones.
        seed: where everything comes from.
    """

    training_set: TrainingSet
    templates: Sequence[nn.Module]
    recipe: Recipe
    lifetime: int
    pretrained: bool
    seed: int

    def newborn(self, number: int, life: int) -> nn.Module:
        """Network `number` at the start of its `life`, on the device of the training set."""
        seed = derive_seed(self.seed, "surrogate", number, "life", life)
        device = self.training_set.device
        if self.templates:
            template = self.templates[number % len(self.templates)]
            if self.pretrained:
                return copy.deepcopy(template).to(device)
            return reborn(template, self.training_set, seed=seed).to(device)
        channels, height, width = self.training_set.image_shape
        network = build(
            self.recipe.model,
            num_classes=self.training_set.num_classes,
            in_channels=channels,
            image_size=(height, width),
            width=self.recipe.width,
            seed=seed,
            normalization=self.training_set.channel_statistics,
        )
        return _whitened(network, self.training_set).to(device)

    def augmented(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Float[M b c h w] as the recipe augments them, each network with draws of its own."""
        recipe = self.recipe
        if not (recipe.flip or recipe.crop_padding or recipe.cutout):
            return images
        parts = [
            augment(
                part,
                flip=recipe.flip,
                crop_padding=recipe.crop_padding,
                cutout=recipe.cutout,
                generator=draws,
            )
            for part, draws in zip(images, generators, strict=True)
        ]
        return torch.stack(parts)


@final
class Epoch:
    """One epoch of a stack: which examples make up each batch of each network, and its augmentation.

    Arguments:
        surrogates: whose next epoch this is.
    """

    def __init__(self, surrogates: Surrogates) -> None:
        self.upbringing = surrogates.upbringing
        self.names = [
            ("surrogate", number, "life", life, "epoch", age)
            for number, life, age in zip(surrogates.numbers, surrogates.lives, surrogates.ages, strict=True)
        ]
        count = len(self.upbringing.training_set)
        # Drawn and kept on the CPU: every device then sees the same order.
        self.orders = torch.stack([torch.randperm(count, generator=draws) for draws in self.draws("order")])
        bounds = batch_bounds(count, self.upbringing.recipe.batch_size)
        sizes = [stop - start for start, stop in bounds]
        self.rows = torch.split(self.orders, sizes, 1)
        recipe = self.upbringing.recipe
        rates = [
            [
                recipe.learning_rate_at(min(age + (batch + 0.5) / len(sizes), recipe.epochs))
                for age in surrogates.ages
            ]
            for batch in range(len(sizes))
        ]
        self.rates = torch.tensor(rates, device=self.upbringing.training_set.device)
        self.training_draws = self.draws("augmentation")

    def __len__(self) -> int:
        return len(self.rows)

    def draws(self, purpose: str) -> list[torch.Generator]:
        """A generator for each network."""
        return [generator(self.upbringing.seed, *name, purpose) for name in self.names]

    def step(self, batch: int) -> InnerStep:
        """The inner optimiser at `batch`, each network with the rate of its age."""
        return InnerStep(self.upbringing.recipe, self.rates[batch])

    def examples(
        self, rows: Tensor, poisons: tuple[Tensor, Tensor] | None, draws: Sequence[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        """Images Float[M b c h w] in [0, 1], augmented, and labels Int64[M b], of the examples at `rows`.

        Arguments:
            rows: Int64[M b] places in the training set, on the CPU.
            poisons: Int64[q] places among the M b rows taken one after another, and Float[q c h w] what to
                put there, differentiably; None leaves the batch clean.
            draws: a generator for each network.
        """
        training_set = self.upbringing.training_set
        flat = rows.flatten().to(training_set.device)
        images = training_set.images.index_select(0, flat).float().div_(255)
        if poisons is not None:
            places, pixels = poisons
            images = images.index_put((places.to(images.device),), pixels)
        labels = training_set.labels.index_select(0, flat)
        return self.upbringing.augmented(images.view(*rows.shape, *images.shape[1:]), draws), labels.view(
            rows.shape
        )


@final
class Surrogates:
    """A stack of networks that are trained in step.

    Arguments:
        upbringing: how they are raised.
        numbers: which networks of the ensemble these are; all of one architecture.
    """

    def __init__(self, upbringing: Upbringing, numbers: Sequence[int]) -> None:
        self.upbringing = upbringing
        self.numbers = tuple(numbers)
        self.lives = [0] * len(self.numbers)
        self.ages = [0] * len(self.numbers)
        born = [upbringing.newborn(number, 0) for number in self.numbers]
        self.stack = Stack(born[0])
        states = [_state(network, upbringing.recipe) for network in born]
        if any(
            {name: value.shape for name, value in state.items()}
            != {name: value.shape for name, value in states[0].items()}
            for state in states
        ):
            raise InputError("metapoison: networks worked on together must have one architecture")
        # parameter., momentum. and buffer. by name, each [M ...]: everything a checkpoint has to keep.
        self.tensors = {name: torch.stack([state[name] for state in states]) for name in states[0]}

    @property
    def parameters(self) -> Tensors:
        """Float[M ...] by name: what is trained."""
        return self._group("parameter.")

    @property
    def momenta(self) -> Tensors:
        """Float[M ...] by name, empty where the recipe has no momentum."""
        return self._group("momentum.")

    @property
    def buffers(self) -> Tensors:
        """[M ...] by name: running statistics, and parameters that do not require a gradient."""
        return self._group("buffer.")

    def _group(self, prefix: str) -> Tensors:
        return {
            name.removeprefix(prefix): value
            for name, value in self.tensors.items()
            if name.startswith(prefix)
        }

    def train(self, epoch: Epoch, batch: int, poisons: tuple[Tensor, Tensor] | None = None) -> None:
        """Take one ordinary step on batch number `batch` of `epoch`."""
        images, labels = epoch.examples(epoch.rows[batch], poisons, epoch.training_draws)
        with torch.enable_grad():
            parameters = {name: value.detach().requires_grad_() for name, value in self.parameters.items()}
            logits = self.stack(parameters, self.buffers, images, train=True, once=True)
            loss = training_loss(logits, labels, self.upbringing.recipe)
            gradients = torch.autograd.grad(loss, list(parameters.values()))
        with torch.no_grad():
            moved, momenta = epoch.step(batch)(parameters, self.momenta, gradients)
        for prefix, values in (("parameter.", moved), ("momentum.", momenta)):
            self.tensors |= {prefix + name: value for name, value in values.items()}

    def grow(self, epoch: Epoch) -> None:
        """Take all the steps of `epoch` on clean data, and be one epoch older."""
        for batch in range(len(epoch)):
            self.train(epoch, batch)
        self.grow_older()

    def grow_older(self) -> None:
        """Count an epoch that has been trained."""
        self.ages = [age + 1 for age in self.ages]

    def come_of_age(self) -> None:
        """Let networks that have lived for `lifetime` epochs start again."""
        for place, (number, age) in enumerate(zip(self.numbers, self.ages, strict=True)):
            if age >= self.upbringing.lifetime:
                self.lives[place] += 1
                self.ages[place] = 0
                network = self.upbringing.newborn(number, self.lives[place])
                self.put(place, _state(network, self.upbringing.recipe))

    def taken(self, place: int) -> Tensors:
        """A copy of the state of the network at `place`, for `put`."""
        return {name: value[place].detach().clone() for name, value in self.tensors.items()}

    def put(self, place: int, state: Mapping[str, Tensor]) -> None:
        """Give the network at `place` another state."""
        for name, value in state.items():
            stacked = self.tensors[name].detach().clone()
            stacked[place] = value
            self.tensors[name] = stacked


def ensemble(
    upbringing: Upbringing, count: int, *, together: int, pretraining: Literal["separate", "shared"]
) -> list[Surrogates]:
    """`count` networks in stacks of `together`, network m at epoch floor(m T / count).

    Arguments:
        upbringing: how they are raised.
        count: M.
        together: networks a stack; the last one may hold fewer.
        pretraining: each network is trained from its own initialisation ("separate"), for about M T / 2
            epochs in all; or all are checkpoints of one run until they first come of age ("shared"), for T
            epochs.
    """
    starts = [number * upbringing.lifetime // count for number in range(count)]
    stacks = [
        Surrogates(upbringing, range(first, min(first + together, count)))
        for first in range(0, count, together)
    ]
    if pretraining == "shared":
        guide = Surrogates(upbringing, [0])
        stages = {0: guide.taken(0)}
        for epoch in range(max(starts)):
            guide.grow(Epoch(guide))
            stages[epoch + 1] = guide.taken(0)
        for stack in stacks:
            for place, number in enumerate(stack.numbers):
                stack.put(place, stages[starts[number]])
                stack.ages[place] = starts[number]
        return stacks
    for stack in stacks:
        wanted = [starts[number] for number in stack.numbers]
        grown = {place: stack.taken(place) for place, start in enumerate(wanted) if not start}
        for epoch in range(max(wanted)):
            stack.grow(Epoch(stack))
            # A stack moves in step, so those that are to stay younger are set aside at their age.
            grown |= {place: stack.taken(place) for place, start in enumerate(wanted) if start == epoch + 1}
        for place, state in grown.items():
            stack.put(place, state)
        stack.ages = wanted
    return stacks


def reborn(template: nn.Module, training_set: TrainingSet, *, seed: int) -> nn.Module:
    """A copy with new parameters, on the CPU; layers that are fitted to images, as `train` fits them."""
    return _whitened(reinitialized(template, seed=seed).cpu(), training_set)


def _whitened(network: nn.Module, training_set: TrainingSet) -> nn.Module:
    whiten(network, training_set.batch(0, _IMAGES_FOR_WHITENING)[0].cpu())
    return network


def _state(network: nn.Module, recipe: Recipe) -> Tensors:
    """What a network brings into a stack, by prefixed names."""
    state: Tensors = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            state[f"parameter.{name}"] = parameter.detach().clone().contiguous()
            if recipe.momentum:
                state[f"momentum.{name}"] = torch.zeros_like(state[f"parameter.{name}"])
        else:
            state[f"buffer.{name}"] = parameter.detach().clone().contiguous()
    for name, buffer in network.named_buffers():
        state[f"buffer.{name}"] = buffer.detach().clone()
    if not any(name.startswith("parameter.") for name in state):
        raise InputError("surrogate: none of its parameters requires a gradient; there is nothing to train")
    return state
