"""`Student`: a copy of the victim that is trained by steps whose loss a method says.

For methods whose loss is not that of training: they hold the student against a teacher, or climb. Images are
augmented as the recipe says; the learning rate is the method's own.

Repeatable as training is: every epoch draws from the seed and its own name. The global random state is as
before when an epoch ends. Cost: one forward and backward pass an example, and whatever the loss adds.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from unpoison._global_randomness import own_randomness
from unpoison._seeds import derive_seed, generator
from unpoison.data import TrainingSet, augment
from unpoison.errors import TrainingDivergedError
from unpoison.models import fastest_layout
from unpoison.training import Recipe

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""From images Float[b c h w], logits Float[b classes], labels Int64[b] and the batch's places Int64[b] in the
examples of the epoch to the number to be lessened."""


@final
@dataclass(frozen=True)
class Lesson:
    """What an epoch came to.

    Arguments:
        loss: its mean over the examples.
        accuracy: the share of the examples that was answered as labelled, in [0, 1], as trained on.
        examples: how many were trained on.
        steps: how many steps were taken.
    """

    loss: float
    accuracy: float
    examples: int
    steps: int


@final
class Student:
    """A copy of `victim` on `device`, all of whose parameters are trained."""

    def __init__(
        self,
        victim: nn.Module,
        recipe: Recipe,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        *,
        device: torch.device,
        seed: int,
        method: str,
    ) -> None:
        self.network = copy.deepcopy(victim).to(device).requires_grad_(True)
        self.network.zero_grad(set_to_none=True)
        self.layout: torch.memory_format | None = None
        self.optimizer = optimizer(list(self.network.parameters()))
        self.recipe, self.device, self.seed, self.method = recipe, device, seed, method

    def epoch(
        self,
        examples: TrainingSet,
        loss: Loss,
        *,
        name: str,
        batch_size: int,
        batch_statistics: bool = True,
        steps: int | None = None,
    ) -> Lesson:
        """One pass over the examples in a new order.

        Arguments:
            examples: on the student's device.
            loss: what is lessened.
            name: of the epoch, unlike any other of this student's; order and augmentation hang on it.
            batch_size: examples a step; a single example left over joins the batch before.
            batch_statistics: whether batch norm goes by the batch and learns from it, or stays as it is.
            steps: stop after so many steps.

        Raises:
            TrainingDivergedError: the loss or a parameter is no longer finite.
        """
        shuffle = torch.randperm(len(examples), generator=generator(self.seed, self.method, name, "order"))
        batches = list(torch.split(shuffle.to(self.device), batch_size))
        if len(batches) > 1 and len(batches[-1]) == 1:
            batches[-2:] = [torch.cat(batches[-2:])]
        batches = batches[:steps]
        if self.layout is None:
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.layout = fastest_layout(self.network, examples.images)
            self.network.to(memory_format=self.layout)  # type: ignore[call-overload]
        draws = generator(self.seed, self.method, name, "augmentation", device=self.device)
        losses = torch.zeros(len(batches), device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        self.network.train()
        if not batch_statistics:
            for module in self.network.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        network_seed = derive_seed(self.seed, self.method, name, "network")
        with own_randomness(self.device, seed=network_seed, deterministic=True):
            for step, places in enumerate(batches):
                images = augment(
                    examples.images.index_select(0, places),
                    flip=self.recipe.flip,
                    crop_padding=self.recipe.crop_padding,
                    cutout=self.recipe.cutout,
                    generator=draws,
                )
                images = images.to(torch.float32, memory_format=self.layout).div_(255)
                labels = examples.labels.index_select(0, places)
                logits: Tensor = self.network(images)
                value = loss(images, logits, labels, places)
                self.optimizer.zero_grad(set_to_none=True)
                value.backward()  # type: ignore[no-untyped-call]
                self.optimizer.step()
                losses[step] = value.detach()
                correct += (logits.detach().argmax(1) == labels).sum()
                # On the CPU looking costs nothing; elsewhere it would make the host wait in every step.
                if self.device.type == "cpu" and not math.isfinite(losses[step].item()):
                    break
        self.network.eval()
        self._stop_if_diverged(losses, name)
        sizes = torch.tensor([len(places) for places in batches], dtype=torch.float64)
        count = int(sizes.sum())
        return Lesson(float(losses.cpu().double() @ sizes / count), int(correct) / count, count, len(batches))

    def _stop_if_diverged(self, losses: Tensor, name: str) -> None:
        bad = (~losses.isfinite()).nonzero()
        step = int(bad[0]) if len(bad) else None
        if step is None:
            # The last update is not followed by a loss that would show it.
            finite = torch.stack([parameter.isfinite().all() for parameter in self.network.parameters()])
            step = None if bool(finite.all()) else len(losses) - 1
        if step is not None:
            rate = self.optimizer.param_groups[0]["lr"]
            raise TrainingDivergedError(
                f"{self.method}: diverged: the loss is not finite at step {step} of {name}, where the "
                f"learning rate is {rate:g}; lower learning_rate"
            )
