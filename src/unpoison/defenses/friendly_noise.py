"""Friendly Noise: add to every image the largest noise that leaves the network's prediction as it is.

Liu, Yang and Mirzasoleiman, "Friendly Noise against Adversarial Noise: A Powerful Defense against Data
Poisoning Attacks" (NeurIPS 2022, arXiv 2208.10224), section 4, and the authors' released code.

Stages:

1. train as usual, with random noise on every image, until `begin_epoch`;
2. then optimise the noise of every image: minimise KL(prediction for the clean image || prediction for the
   noisy one) - `weight` * mean square of the noise, by SGD from uniform noise of +-8/255, with the learning
   rate divided by 10 at half and three quarters of the steps; the noise is clamped to +-`clamp`/255;
3. from then on train on the image with its noise, clamped to [0, 1], plus fresh random noise (not clamped),
   then augmented.

Clean-label poison is effective in a narrow region of image space, which noise leaves.

Departures from the released code: the gradient of each image is divided by 128 for every batch, while the
last batch of an epoch is smaller in the released code; the noise is stored as 8-bit steps of clamp/127, a
quarter of the memory; crops are those of the recipe, not bilinear ones; the divergence is computed in
float64.

Cost: once, `steps` forward and backward passes over the set, as much as `steps` epochs; one byte a pixel for
the noise.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unpoison._option_checks import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from unpoison._seeds import generator
from unpoison.data import TrainingSet
from unpoison.defenses._methods import register
from unpoison.models import logits_of
from unpoison.registry import Presets
from unpoison.training import Batch, Defense, Recipe

RandomNoise = Literal["bernoulli", "gaussian", "uniform", "none"]
# The batch size of the released code, for which its learning rate is 100.
_PUBLISHED_BATCH = 128
_START = 8 / 255


@final
class _Memory:
    """The state of the run: the noise, and the divergence that it causes."""

    def __init__(self) -> None:
        self.begin(0)

    def begin(self, seed: int) -> None:
        """Clear the state for a new run."""
        self.seed = seed
        self.noise: Tensor | None = None
        self.divergence = 0.0
        self.seconds = 0.0


@final
@register(
    name="friendly-noise",
    title="Friendly Noise (FRIENDS)",
    summary="Adds to every image the largest noise that leaves its prediction as it is, and random noise.",
    paper="Liu, Yang and Mirzasoleiman, NeurIPS 2022, arXiv 2208.10224",
    cost="once, as much as 30 epochs; one byte a pixel",
    presets=("friends-b", "friends-g"),
)
@dataclass(frozen=True, kw_only=True)
class FriendlyNoise(Defense):
    """Noise that does not change predictions, and random noise.

    Arguments:
        begin_epoch: the epoch, counted from 0, before which the friendly noise is optimised; a shorter run
            has none.
        steps: of SGD on the noise, 1 or more.
        learning_rate: of these, for batches of 128 images; 0 or more.
        momentum: of these, in [0, 1).
        weight: of the mean square of the noise in the loss, against a KL divergence; 0 or more.
        clamp: the largest friendly noise, in 1/255, above 0.
        random: noise drawn anew for every image in every step: plus or minus `size` for each pixel
            ("bernoulli"), normal with standard deviation `size` ("gaussian"), uniform within it, or none.
        size: in 1/255, 0 or more.
        images_at_once: for how many images noise is optimised together; bounds the memory.

    Raises:
        InputError: a value is out of its range.

    >>> from unpoison import defenses
    >>> defenses.get("friendly-noise", preset="friends-g").random
    'gaussian'
    """

    PRESETS: ClassVar[Presets] = {"friends-b": {}, "friends-g": {"random": "gaussian"}}

    begin_epoch: NonNegativeInt = 5
    steps: PositiveInt = 30
    learning_rate: NonNegativeFloat = 100.0
    momentum: Annotated[float, "[0, 1)"] = 0.9
    weight: NonNegativeFloat = 1.0
    clamp: PositiveFloat = 16.0
    random: RandomNoise = "bernoulli"
    size: NonNegativeFloat = 8.0
    images_at_once: PositiveInt = field(default=512, repr=False)
    _memory: _Memory = field(default_factory=_Memory, init=False, repr=False, compare=False)

    def begin(self, training_set: TrainingSet, recipe: Recipe, *, seed: int) -> TrainingSet:
        """Clear the state."""
        self._memory.begin(seed)
        return training_set

    def keep(self, epoch: int, model: nn.Module, training_set: TrainingSet, alive: Tensor) -> Tensor:
        """All alive; before `begin_epoch` the friendly noise is optimised."""
        if epoch == self.begin_epoch:
            started = time.perf_counter()
            memory = self._memory
            noise = torch.zeros(training_set.images.shape, dtype=torch.int8, device=training_set.device)
            total = torch.zeros((), device=training_set.device)
            draws = generator(memory.seed, "friendly noise")
            chosen = alive.nonzero().squeeze(1)
            for some in torch.split(chosen, self.images_at_once):
                images = training_set.images[some].float() / 255
                # Drawn on the CPU, image by image: equal on every device and for every split.
                start = ((2 * torch.rand(images.shape, generator=draws) - 1) * _START).to(images.device)
                found, divergence = self.optimized(model, images, start)
                noise[some] = (found * (127 * 255 / self.clamp)).round().to(torch.int8)
                total += divergence.sum()
            memory.noise, memory.divergence = noise, float(total) / len(chosen)
            memory.seconds = time.perf_counter() - started
        return alive

    def optimized(self, model: nn.Module, images: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """The friendly noise of some images.

        Arguments:
            model: in eval mode.
            images: Float[b c h w] in [0, 1].
            start: Float[b c h w], the initial noise.

        Returns:
            Float[b c h w] within +-clamp/255, and Float64[b], the KL divergence that it causes.
        """
        bound = self.clamp / 255
        with torch.no_grad():
            clean = F.log_softmax(logits_of(model, images).double(), dim=1)

        def divergences(noise: Tensor) -> Tensor:
            noisy = F.log_softmax(logits_of(model, (images + noise).clamp(0, 1)).double(), dim=1)
            return F.kl_div(noisy, clean, reduction="none", log_target=True).sum(1)

        noise = start.clone().requires_grad_()
        momentum = torch.zeros_like(start)
        rate = self.learning_rate
        with torch.enable_grad():
            for step in range(self.steps):
                if step and step in (self.steps // 2, self.steps // 4 * 3):
                    rate /= 10
                clamped = noise.clamp(-bound, bound)
                sizes = clamped.square().flatten(1).mean(1)
                loss = (divergences(clamped) - self.weight * sizes).sum() / _PUBLISHED_BATCH
                (gradient,) = torch.autograd.grad(loss, noise)
                momentum.mul_(self.momentum).add_(gradient)
                with torch.no_grad():
                    noise -= rate * (gradient + self.momentum * momentum)
        with torch.no_grad():
            found = noise.detach().clamp(-bound, bound)
            return found, divergences(found)

    def batch(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The images with their friendly and random noise, augmented."""
        images = batch.images.float() / 255
        if self._memory.noise is not None:
            # Checkpoints are read to the CPU.
            self._memory.noise = self._memory.noise.to(images.device)
            noise = self._memory.noise.index_select(0, batch.indices)
            images = (images + noise * (self.clamp / (127 * 255))).clamp_(0, 1)
        return batch.augment(self._with_random(images, batch.generator)), batch.labels

    def _with_random(self, images: Tensor, generator: torch.Generator) -> Tensor:
        size = self.size / 255
        where: dict[str, Any] = {"generator": generator, "device": images.device}
        match self.random:
            case "bernoulli":
                return images + size * (2.0 * torch.randint(2, images.shape, **where) - 1)
            case "gaussian":
                return images + size * torch.randn(images.shape, **where)
            case "uniform":
                return images + size * (2 * torch.rand(images.shape, **where) - 1)
            case "none":
                return images

    def state(self) -> dict[str, Tensor]:
        """The noise, once there is any."""
        memory = self._memory
        if memory.noise is None:
            return {}
        numbers = torch.tensor([memory.divergence, memory.seconds], dtype=torch.float64)
        return {"noise": memory.noise, "numbers": numbers}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` returned."""
        if "noise" in state:
            self._memory.noise = state["noise"]
            self._memory.divergence, self._memory.seconds = state["numbers"].tolist()

    def report(self) -> dict[str, Any]:
        """The mean absolute noise in 1/255, the mean KL divergence that it causes, and its seconds."""
        memory = self._memory
        if memory.noise is None:
            return {"friendly_noise": None}
        size = float(memory.noise.abs().float().mean()) * self.clamp / 127
        return {
            "friendly_noise": {
                "mean_size": round(size, 4),
                "mean_divergence": memory.divergence,
                "seconds": memory.seconds,
            }
        }
