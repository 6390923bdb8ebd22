"""`Student`: a copy of a network that is trained by a loss of the method's own.

For methods that compare the student with a teacher, or ascend a loss. Images are augmented as the recipe
says, if there is one; the learning rate is the method's own.

Repeatable like training: every epoch draws from the seed and its own name. The global random state is as
before when an epoch ends. Cost: one forward and backward pass an example, and that of the loss.
"""

from __future__ import annotations

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
from unpoison.models import fastest_layout, logits_of
from unpoison.training import EpochRecord, batch_bounds
from unpoison.unlearners._unlearner import Request

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""From images Float[b c h w], logits Float[b classes], labels Int64[b] and the indices Int64[b] of the batch
in the examples of the epoch to the loss, a scalar."""


@final
@dataclass(frozen=True)
class Pass:
    """The result of one epoch.

    Arguments:
        loss: mean over the examples.
        accuracy: share of the examples that were classified as labelled, in [0, 1], as trained on.
        examples: how many were trained on.
        steps: how many steps there were.
    """

    loss: float
    accuracy: float
    examples: int
    steps: int

    def record(self, epoch: int, *, learning_rate: float, seconds: float) -> EpochRecord:
        """As a record of the history."""
        return EpochRecord(
            epoch=epoch,
            loss=self.loss,
            accuracy=self.accuracy,
            learning_rate=learning_rate,
            examples=self.examples,
            seconds=seconds,
        )


@final
class Student:
    """A copy of the network of `request`, or of `network`, with all parameters trained."""

    def __init__(
        self,
        request: Request,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        network: nn.Module | None = None,
    ) -> None:
        copied = request.copied() if network is None else network.to(request.device)
        self.network = copied.requires_grad_(True)
        self.layout: torch.memory_format | None = None
        self.optimizer = optimizer(list(self.network.parameters()))
        self.recipe, self.device = request.recipe, request.device
        self.seed, self.method = request.seed, request.method

    def epoch(
        self,
        examples: TrainingSet,
        loss: Loss,
        *,
        name: str,
        batch_size: int,
        batch_statistics: bool = True,
        steps: int | None = None,
    ) -> Pass:
        """One pass over the examples in a new order.

        Arguments:
            examples: on the student's device.
            loss: is minimised.
            name: of the epoch, which seeds its order and augmentation; each of a student is different.
            batch_size: examples a step; a single example that is left over joins the batch before.
            batch_statistics: whether batch norm uses and learns the statistics of the batch, or stays as it
                is.
            steps: stop after so many steps.

        Raises:
            TrainingDivergedError: the loss or a parameter is no longer finite.
        """
        shuffle = torch.randperm(len(examples), generator=generator(self.seed, self.method, name, "order"))
        shuffle = shuffle.to(self.device)
        batches = [shuffle[start:stop] for start, stop in batch_bounds(len(shuffle), batch_size)[:steps]]
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
            for step, indices in enumerate(batches):
                images = examples.images.index_select(0, indices)
                if self.recipe is not None:
                    images = augment(
                        images,
                        flip=self.recipe.flip,
                        crop_padding=self.recipe.crop_padding,
                        cutout=self.recipe.cutout,
                        generator=draws,
                    )
                images = images.to(torch.float32, memory_format=self.layout).div_(255)
                labels = examples.labels.index_select(0, indices)
                logits = logits_of(self.network, images)
                value = loss(images, logits, labels, indices)
                self.optimizer.zero_grad(set_to_none=True)
                value.backward()  # type: ignore[no-untyped-call]
                self.optimizer.step()
                losses[step] = value.detach()
                correct += (logits.detach().argmax(1) == labels).sum()
                # Free on the CPU; on other devices it would synchronise in every step.
                if self.device.type == "cpu" and not math.isfinite(losses[step].item()):
                    break
        self.network.eval()
        self._stop_if_diverged(losses, name)
        sizes = torch.tensor([len(indices) for indices in batches], dtype=torch.float64)
        count = int(sizes.sum())
        return Pass(float(losses.cpu().double() @ sizes / count), int(correct) / count, count, len(batches))

    def _stop_if_diverged(self, losses: Tensor, name: str) -> None:
        bad = (~losses.isfinite()).nonzero()
        step = int(bad[0]) if len(bad) else None
        if step is None:
            # No loss follows the last update.
            finite = torch.stack([parameter.isfinite().all() for parameter in self.network.parameters()])
            step = None if bool(finite.all()) else len(losses) - 1
        if step is not None:
            rate = self.optimizer.param_groups[0]["lr"]
            raise TrainingDivergedError(
                f"{self.method}: diverged: the loss is not finite at step {step} of {name}, where the "
                f"learning rate is {rate:g}; lower learning_rate"
            )


def soft_divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Float64[b]: KL(teacher || student) of the softmax at `temperature`, for each example.

    In float64, since the gradient is the difference of two probabilities that are both near 1 where teacher
    and student agree.
    """
    student, target = ((one.double() / temperature).log_softmax(1) for one in (logits, teacher))
    return torch.nn.functional.kl_div(student, target, log_target=True, reduction="none").sum(1)
