"""`Student`: a copy of a network that is trained by a loss of the method's own, on any examples.

For methods that compare the student with a teacher, or ascend a loss, and for examples that are no 8-bit
images. 8-bit images are augmented as the recipe says, if there is one; other examples are trained on as they
are read, through their worker processes where they have some.

Repeatable like training: every epoch draws from the seed and its own name. The global random state is as
before when an epoch ends. Cost: one forward and backward pass an example, and that of the loss.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import final

import torch
from torch import Tensor, nn

from unpoison._global_randomness import own_randomness
from unpoison._inputs import Inputs, placed
from unpoison._seeds import derive_seed, generator
from unpoison.data import Examples, TrainingSet
from unpoison.errors import TrainingDivergedError
from unpoison.models import fastest_layout, laid_out, logits_of
from unpoison.training import (
    EpochRecord,
    augmented,
    batch_bounds,
    diverged_step,
    in_training_mode,
    own_modes,
    set_learning_rate,
)
from unpoison.unlearners._unlearner import Request

Loss = Callable[[Inputs, Tensor, Tensor, Tensor], Tensor]
"""From the inputs of b examples, logits Float[b classes], labels Int64[b] and the indices Int64[b] of the
batch in the examples of the epoch to the loss, a scalar."""


@final
class Student:
    """A copy of the network of a request, with the parameters trained that are not frozen.

    Arguments:
        request: the network, recipe and seed.
        optimizer: made from the parameters.
        steps: the most that may be taken in all epochs; None is no limit.
        network: the copy to train, in the modes that it was given in; one of the request's network when None.
    """

    def __init__(
        self,
        request: Request,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        *,
        steps: int | None = None,
        network: nn.Module | None = None,
    ) -> None:
        self.network = request.trainable() if network is None else network
        self.modes = own_modes(self.network)
        self.layout: torch.memory_format | None = None
        self.optimizer = optimizer([one for one in self.network.parameters() if one.requires_grad])
        self.recipe, self.device = request.recipe, request.device
        self.seed, self.method = request.seed, request.method
        self.steps_left = steps

    def epoch(
        self,
        examples: Examples,
        loss: Loss,
        *,
        number: int,
        batch_size: int,
        part: str = "epoch",
        batch_statistics: bool = True,
        started: float | None = None,
        labels: Tensor | None = None,
        rate: Callable[[float], float] | None = None,
        order: Tensor | None = None,
    ) -> EpochRecord:
        """One pass over the examples in a new order, until no step is left.

        Arguments:
            examples: a `TrainingSet` on the student's device, or any other, which is not augmented.
            loss: is minimised.
            number: of the epoch, counted from 0; with `part` it seeds order and augmentation.
            batch_size: examples a step; a single example that is left over joins the batch before.
            part: of the epoch, if it has several.
            batch_statistics: whether batch norm uses and learns the statistics of the batch, or stays as it
                is.
            started: `time.perf_counter()` when the epoch began; now when None.
            labels: Int64[n], those to train on in place of the examples' own.
            rate: the learning rate when a fraction of the epoch has passed; the optimizer's when None.
            order: Int64[n], drawn here when None.

        Raises:
            TrainingDivergedError: the loss or a parameter is no longer finite.
        """
        started = time.perf_counter() if started is None else started
        name = f"{part} {number}"
        shuffle = order
        if shuffle is None:
            draw = generator(self.seed, self.method, name, "order")
            shuffle = torch.randperm(len(examples), generator=draw)
        shuffle = shuffle.to(self.device)
        bounds = batch_bounds(len(shuffle), batch_size)[: self.steps_left]
        if self.layout is None:
            self.layout = fastest_layout(laid_out(self.network, torch.channels_last), examples.batch(0, 2)[0])
            laid_out(self.network, self.layout)
        draws = generator(self.seed, self.method, name, "augmentation", device=self.device)
        losses = torch.zeros(len(bounds), device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        in_training_mode(self.network, self.modes)
        if not batch_statistics:
            for module in self.network.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        network_seed = derive_seed(self.seed, self.method, name, "network")
        with own_randomness(self.device, seed=network_seed, deterministic=True):
            batches = self._batches(examples, shuffle, bounds, draws)
            targets = None if labels is None else labels.to(self.device)
            for step, (indices, inputs, own) in enumerate(batches):
                if rate is not None:
                    set_learning_rate(self.optimizer, rate((step + 0.5) / len(bounds)))
                wanted = own if targets is None else targets[indices]
                logits = logits_of(self.network, inputs)
                value = loss(inputs, logits, wanted, indices)
                self.optimizer.zero_grad(set_to_none=True)
                value.backward()  # type: ignore[no-untyped-call]
                self.optimizer.step()
                losses[step] = value.detach()
                correct += (logits.detach().argmax(1) == wanted).sum()
                # Free on the CPU; on other devices it would synchronise in every step.
                if self.device.type == "cpu" and not math.isfinite(losses[step].item()):
                    break
        self.network.eval()
        last_rate = self.optimizer.param_groups[0]["lr"]
        diverged = diverged_step(losses, self.network)
        if diverged is not None:
            raise TrainingDivergedError(
                f"{self.method}: diverged: the loss is not finite at step {diverged} of {name}, where the "
                f"learning rate is {last_rate:g}; lower learning_rate"
            )
        if self.steps_left is not None:
            self.steps_left -= len(bounds)
        sizes = torch.tensor([stop - start for start, stop in bounds], dtype=torch.float64)
        count = int(sizes.sum())
        return EpochRecord(
            epoch=number,
            loss=float(losses.cpu().double() @ sizes / count),
            accuracy=int(correct) / count,
            learning_rate=last_rate,
            examples=count,
            seconds=time.perf_counter() - started,
        )

    def _batches(
        self, examples: Examples, order: Tensor, bounds: list[tuple[int, int]], draws: torch.Generator
    ) -> Iterator[tuple[Tensor, Inputs, Tensor]]:
        """Indices, inputs (8-bit images augmented) and labels of each batch."""
        if not isinstance(examples, TrainingSet):
            # All batches but the last are of one size, which worker processes read ahead.
            full, (last, end) = bounds[:-1], bounds[-1]
            size, cpu = bounds[0][1], order.cpu()
            read = examples.in_batches(size, cpu[:last]) if full else iter(())
            for start, stop in bounds:
                inputs, labels = next(read) if start < last else examples.at(cpu[last:end])
                yield order[start:stop], placed(inputs, self.device), labels.to(self.device)
            return
        assert self.layout is not None
        for start, stop in bounds:
            indices = order[start:stop]
            images = examples.images.index_select(0, indices)
            if self.recipe is not None:
                images = augmented(images, self.recipe, draws)
            images = images.to(torch.float32, memory_format=self.layout).div_(255)
            yield indices, images, examples.labels.index_select(0, indices)


def soft_divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Float64[b]: KL(teacher || student) of the softmax at `temperature`, for each example.

    In float64, since the gradient is the difference of two probabilities that are both near 1 where teacher
    and student agree.
    """
    student, target = ((one.double() / temperature).log_softmax(1) for one in (logits, teacher))
    return torch.nn.functional.kl_div(student, target, log_target=True, reduction="none").sum(1)
