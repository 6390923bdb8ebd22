"""The surrogates of MetaPoison: M networks at staggered epochs of training, which restart when they expire.

Huang et al. 2020, arXiv 2004.00225, algorithm 1. Network m is first trained to epoch floor(m T / M). Every
craft step trains each network for one epoch. A network that reaches epoch T has expired and restarts from new
parameters, so that the ensemble always covers all of training. Everything random depends on the seed, the
network's number, its restart and its epoch alone, so an ensemble that is restored from a checkpoint continues
bit for bit.

Networks are kept in stacks. A stack of one is trained like any network, with its images channels last; larger
ones go through `vmap`, which pays on a GPU alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn

from unpoison._checkpoints import Checkpoint
from unpoison._seeds import derive_seed, generator
from unpoison.attacks._networks import fresh_copy
from unpoison.attacks.metapoison.look_ahead import SGDStep, StackedNetwork, Tensors, training_loss
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.training import Recipe, augmented, batch_bounds, initial_network


@final
@dataclass(frozen=True, kw_only=True)
class SurrogateConfiguration:
    """How surrogates are initialised and trained.

    Arguments:
        training_set: the clean set, on the device where all work is done.
        templates: networks whose architectures (and, for fine-tuning, parameters) are used in turn; empty for
            the recipe's own architecture.
        recipe: how they are trained.
        lifetime: T, the epochs after which a network restarts.
        pretrained: start from the template's parameters instead of new ones.
        seed: of everything random.
    """

    training_set: TrainingSet
    templates: Sequence[nn.Module]
    recipe: Recipe
    lifetime: int
    pretrained: bool
    seed: int

    def initial(self, number: int, restart: int) -> nn.Module:
        """Network `number` after its `restart`, untrained, in float32 on the device of the training set."""
        seed = derive_seed(self.seed, "surrogate", number, "life", restart)
        device = self.training_set.device
        if self.templates:
            template = self.templates[number % len(self.templates)]
            if self.pretrained:
                return copy.deepcopy(template).float().to(device)
            return fresh_copy(template, self.training_set, seed=seed).float().to(device)
        return initial_network(self.training_set, self.recipe, seed=seed).to(device)

    def augmented(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Float[M b c h w] as the recipe augments them, with one generator for each network."""
        recipe = self.recipe
        if not (recipe.flip or recipe.crop_padding or recipe.cutout):
            return images
        parts = zip(images, generators, strict=True)
        return torch.stack([augmented(part, recipe, draws) for part, draws in parts])


@final
class SurrogateStack:
    """Networks that are trained in step.

    Arguments:
        configuration: how they are initialised and trained.
        numbers: which networks of the ensemble these are; all of one architecture.
    """

    def __init__(self, configuration: SurrogateConfiguration, numbers: Sequence[int]) -> None:
        self.configuration = configuration
        self.numbers = tuple(numbers)
        self.restarts = [0] * len(self.numbers)
        self.epochs = [0] * len(self.numbers)
        networks = [configuration.initial(number, 0) for number in self.numbers]
        self.network = StackedNetwork(networks[0])
        states = [_state(network, configuration.recipe) for network in networks]
        shapes = [{name: value.shape for name, value in state.items()} for state in states]
        if any(each != shapes[0] for each in shapes):
            raise InputError("metapoison: with vmap_size above 1 all surrogates must have one architecture")
        # parameter.NAME, momentum.NAME and buffer.NAME, each [M ...]: everything a checkpoint has to keep.
        self.tensors = {name: torch.stack([state[name] for state in states]) for name in states[0]}

    @property
    def parameters(self) -> Tensors:
        """Float[M ...] by name: what is trained."""
        return self._group("parameter.")

    @property
    def momenta(self) -> Tensors:
        """Float[M ...] by name, empty if the recipe has no momentum."""
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

    def train_step(self, epoch: Epoch, batch: int, poisons: tuple[Tensor, Tensor] | None = None) -> None:
        """Take one step of the recipe on batch number `batch`; for `poisons` see `Epoch.examples`."""
        images, labels = epoch.examples(epoch.rows[batch], poisons, epoch.training_draws)
        with torch.enable_grad():
            parameters = {name: value.detach().requires_grad_() for name, value in self.parameters.items()}
            logits = self.network(parameters, self.buffers, images, train=True, once=True)
            loss = training_loss(logits, labels, self.configuration.recipe)
            gradients = torch.autograd.grad(loss, list(parameters.values()))
        with torch.no_grad():
            moved, momenta = epoch.sgd(batch)(parameters, self.momenta, gradients)
        for prefix, values in (("parameter.", moved), ("momentum.", momenta)):
            self.tensors |= {prefix + name: value for name, value in values.items()}

    def train_epoch(self) -> None:
        """Train one epoch on clean data."""
        epoch = Epoch(self)
        for batch in range(len(epoch)):
            self.train_step(epoch, batch)
        self.count_epoch()

    def count_epoch(self) -> None:
        """Count an epoch whose steps have been taken."""
        self.epochs = [done + 1 for done in self.epochs]

    def restart_expired(self) -> None:
        """Restart the networks that have been trained for `lifetime` epochs."""
        for place, (number, done) in enumerate(zip(self.numbers, self.epochs, strict=True)):
            if done >= self.configuration.lifetime:
                self.restarts[place] += 1
                self.epochs[place] = 0
                network = self.configuration.initial(number, self.restarts[place])
                self.put(place, _state(network, self.configuration.recipe))

    def state_of(self, place: int) -> Tensors:
        """A copy of the state of the network at `place`, for `put`."""
        return {name: value[place].detach().clone() for name, value in self.tensors.items()}

    def put(self, place: int, state: Mapping[str, Tensor]) -> None:
        """Set the state of the network at `place`."""
        for name, value in state.items():
            stacked = self.tensors[name].detach().clone()
            stacked[place] = value
            self.tensors[name] = stacked

    def checkpoint(self) -> tuple[Tensors, dict[str, list[int]]]:
        """What a checkpoint keeps: tensors, and notes ready for JSON."""
        prefix = f"surrogates.{self.numbers[0]}."
        tensors = {prefix + name: value for name, value in self.tensors.items()}
        return tensors, {prefix + "epochs": self.epochs, prefix + "restarts": self.restarts}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over the state that a checkpoint keeps."""
        prefix, device = f"surrogates.{self.numbers[0]}.", self.configuration.training_set.device
        self.tensors = {name: checkpoint.tensors[prefix + name].to(device) for name in self.tensors}
        self.epochs = list(checkpoint.notes[prefix + "epochs"])
        self.restarts = list(checkpoint.notes[prefix + "restarts"])


@final
class Epoch:
    """The next epoch of a stack: the examples in each batch of each network, and their augmentation."""

    def __init__(self, surrogates: SurrogateStack) -> None:
        self.configuration = surrogates.configuration
        self._names = [
            ("surrogate", number, "life", restart, "epoch", epoch)
            for number, restart, epoch in zip(
                surrogates.numbers, surrogates.restarts, surrogates.epochs, strict=True
            )
        ]
        recipe, training_set = self.configuration.recipe, self.configuration.training_set
        count = len(training_set)
        # Drawn and kept on the CPU, so that every device has the same order.
        orders = torch.stack([torch.randperm(count, generator=draws) for draws in self.draws("order")])
        sizes = [stop - start for start, stop in batch_bounds(count, recipe.batch_size)]
        self.rows = torch.split(orders, sizes, 1)
        rates = [
            [
                recipe.learning_rate_at(min(epoch + (batch + 0.5) / len(sizes), recipe.epochs))
                for epoch in surrogates.epochs
            ]
            for batch in range(len(sizes))
        ]
        self._rates = torch.tensor(rates, device=training_set.device)
        self.training_draws = self.draws("augmentation")

    def __len__(self) -> int:
        return len(self.rows)

    def draws(self, purpose: str) -> list[torch.Generator]:
        """A generator for each network."""
        return [generator(self.configuration.seed, *name, purpose) for name in self._names]

    def sgd(self, batch: int) -> SGDStep:
        """The step at `batch`, with the learning rate of each network's epoch."""
        return SGDStep(self.configuration.recipe, self._rates[batch])

    def examples(
        self, rows: Tensor, poisons: tuple[Tensor, Tensor] | None, draws: Sequence[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        """Images Float[M b c h w] in [0, 1], augmented, and labels Int64[M b], of the examples at `rows`.

        Arguments:
            rows: Int64[M b] places in the training set, on the CPU.
            poisons: Int64[q] places among the flattened M b rows, and Float[q c h w] the pixels to put there,
                differentiably; None leaves the batch clean.
            draws: a generator for each network.
        """
        training_set = self.configuration.training_set
        flat = rows.flatten().to(training_set.device)
        images = training_set.images.index_select(0, flat).float().div_(255)
        if poisons is not None:
            places, pixels = poisons
            images = images.index_put((places.to(images.device),), pixels)
        images = images.view(*rows.shape, *images.shape[1:])
        labels = training_set.labels.index_select(0, flat).view(rows.shape)
        return self.configuration.augmented(images, draws), labels


def stacks_of(configuration: SurrogateConfiguration, count: int, *, vmap_size: int) -> list[SurrogateStack]:
    """`count` untrained networks in stacks of `vmap_size`; the last stack may have fewer."""
    return [
        SurrogateStack(configuration, range(first, min(first + vmap_size, count)))
        for first in range(0, count, vmap_size)
    ]


def stagger(
    stacks: Sequence[SurrogateStack],
    *,
    pretraining: Literal["separate", "shared"],
    report: Callable[[int, int], None],
) -> None:
    """Train the M untrained networks so that network m is at epoch floor(m T / M).

    Arguments:
        stacks: of the whole ensemble.
        pretraining: "separate" trains each network from its own initialisation, for about M T / 2 epochs in
            all; with "shared" all are checkpoints of one training until their first restart, for T epochs.
        report: called after each epoch of a stack with the epochs done and to do.
    """
    configuration = stacks[0].configuration
    count = sum(len(stack.numbers) for stack in stacks)
    starts = [number * configuration.lifetime // count for number in range(count)]
    if pretraining == "shared":
        guide = SurrogateStack(configuration, [0])
        states = {0: guide.state_of(0)}
        for epoch in range(max(starts)):
            guide.train_epoch()
            states[epoch + 1] = guide.state_of(0)
            report(epoch + 1, max(starts))
        for stack in stacks:
            stack.epochs = [starts[number] for number in stack.numbers]
            for place, start in enumerate(stack.epochs):
                stack.put(place, states[start])
        return
    total, done = sum(max(starts[number] for number in stack.numbers) for stack in stacks), 0
    for stack in stacks:
        wanted = [starts[number] for number in stack.numbers]
        # A stack is trained in step, so the state of each network is kept at its own epoch.
        kept = {place: stack.state_of(place) for place, start in enumerate(wanted) if not start}
        for epoch in range(max(wanted)):
            stack.train_epoch()
            kept |= {place: stack.state_of(place) for place, start in enumerate(wanted) if start == epoch + 1}
            done += 1
            report(done, total)
        for place, state in kept.items():
            stack.put(place, state)
        stack.epochs = wanted


def _state(network: nn.Module, recipe: Recipe) -> Tensors:
    """The tensors that a network brings into a stack, by prefixed names."""
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
