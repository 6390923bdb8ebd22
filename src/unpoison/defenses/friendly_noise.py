"""Friendly Noise: give every image the largest noise that leaves the network's answer as it is.

Liu, Yang and Mirzasoleiman, "Friendly Noise against Adversarial Noise: A Powerful Defense against Data
Poisoning Attacks" (NeurIPS 2022, arXiv 2208.10224), section 4, and the authors' released code.

Stages:

1. train as usual, with random noise on every image, until `begin_epoch`;
2. then, for every image, find noise that is large and harmless: minimise KL(answer to the noisy image from
   answer to the clean one) - `weight` * mean square of the noise, by SGD from uniform noise of +-8/255, with
   the rate divided by 10 at half and three quarters of the steps; the noise is clamped to +-`clamp`/255;
3. from then on train on the image with its noise, clamped to [0, 1], and fresh random noise on top (not
   clamped), then augmented.

The idea: poison sits in a narrow place of image space, and noise, friendly and random, takes it out of there.

Departures from the released code: the gradient of each image is divided by 128 whatever the batch, while the
released last batch of an epoch is smaller and so moves a little faster; the noise is kept as 8-bit steps of
clamp/127, a quarter of the memory; crops are those of the recipe, not bilinear ones.

Cost: once, `steps` forward and backward passes over the set, which is as much as `steps` epochs; and one byte
a pixel for the noise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, final, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unpoison._seeds import generator
from unpoison.data import TrainingSet
from unpoison.defenses._methods import register
from unpoison.errors import InputError
from unpoison.registry import Presets
from unpoison.training import Defense, Recipe

RandomNoise = Literal["bernoulli", "gaussian", "uniform", "none"]
# The batch of the released code, by which its learning rate of 100 is to be read.
_PUBLISHED_BATCH = 128
_START = 8 / 255


@final
class _Memory:
    """What is remembered of the run: the noise, and how harmless it is."""

    def __init__(self) -> None:
        self.begin(0)

    def begin(self, seed: int) -> None:
        """Forget everything; a new run begins."""
        self.seed = seed
        self.noise: Tensor | None = None
        self.divergence = 0.0
        self.seconds = 0.0


@final
@register(
    name="friendly-noise",
    title="Friendly Noise (FRIENDS)",
    summary="Adds to every image the largest noise that leaves its answer alone, and random noise.",
    paper="Liu, Yang and Mirzasoleiman, NeurIPS 2022, arXiv 2208.10224",
    cost="once, as much as 30 epochs; one byte a pixel",
    presets=("friends-b", "friends-g"),
)
@dataclass(frozen=True, kw_only=True)
class FriendlyNoise(Defense):
    """Noise that the network does not mind, and random noise beside it.

    Arguments:
        begin_epoch: the epoch, counted from 0, before which the friendly noise is found; a run of fewer
            epochs has none.
        steps: of SGD on the noise, 1 or more.
        learning_rate: of these, as for batches of 128 images.
        momentum: of these, in [0, 1).
        weight: what a mean square of 1 is worth against a KL divergence of 1; 0 or more.
        clamp: the largest friendly noise, in 1/255, above 0.
        random: the noise drawn anew for every image in every step: `size` up or down for each number
            ("bernoulli"), normal with deviation `size` ("gaussian"), uniform within it, or none.
        size: in 1/255, 0 or more.
        images_at_once: how many images' noise is found together; bounds the memory, changes nothing else.

    Raises:
        InputError: a value is out of its range.

    >>> from unpoison import defenses
    >>> defenses.get("friendly-noise", preset="friends-g").random
    'gaussian'
    """

    PRESETS: ClassVar[Presets] = {
        "friends-b": {},
        "friends-g": {"random": "gaussian"},
    }

    begin_epoch: int = 5
    steps: int = 30
    learning_rate: float = 100.0
    momentum: float = 0.9
    weight: float = 1.0
    clamp: float = 16.0
    random: RandomNoise = "bernoulli"
    size: float = 8.0
    images_at_once: int = field(default=512, repr=False)
    _memory: _Memory = field(default_factory=_Memory, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.random not in get_args(RandomNoise):
            raise InputError(
                f"friendly-noise: random must be one of {', '.join(get_args(RandomNoise))}, "
                f"found {self.random!r}"
            )
        for name, least, whole in (
            ("begin_epoch", 0, True),
            ("steps", 1, True),
            ("images_at_once", 1, True),
            ("learning_rate", 0, False),
            ("momentum", 0, False),
            ("weight", 0, False),
            ("clamp", 1e-6, False),
            ("size", 0, False),
        ):
            value = getattr(self, name)
            fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
            if not fits or not least <= value < (1 if name == "momentum" else 1e9):
                raise InputError(
                    f"friendly-noise: {name} must be {'a whole' if whole else 'a'} number from {least:g}"
                    f"{' to below 1' if name == 'momentum' else ''}, found {value!r}"
                )

    def begin(self, training_set: TrainingSet, recipe: Recipe, *, seed: int) -> TrainingSet:
        """Forget the run before."""
        self._memory.begin(seed)
        return training_set

    def keep(self, epoch: int, model: nn.Module, training_set: TrainingSet, alive: Tensor) -> Tensor:
        """All of them; before `begin_epoch` the friendly noise is found."""
        if epoch == self.begin_epoch:
            started = time.perf_counter()
            memory = self._memory
            noise = torch.zeros(training_set.images.shape, dtype=torch.int8, device=training_set.device)
            total = torch.zeros((), device=training_set.device)
            draws = generator(memory.seed, "friendly noise")
            chosen = alive.nonzero().squeeze(1)
            for some in torch.split(chosen, self.images_at_once):
                images = training_set.images[some].float() / 255
                # Drawn on the CPU, one image after another: the same on every device and for every split.
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
            start: Float[b c h w], where the search begins.

        Returns:
            Float[b c h w] within +-clamp/255, and Float[b], the KL divergence that it brings.
        """
        bound = self.clamp / 255
        with torch.no_grad():
            answers = F.log_softmax(model(images).float(), dim=1)

        def divergences(noise: Tensor) -> Tensor:
            noisy = F.log_softmax(model((images + noise).clamp(0, 1)).float(), dim=1)
            return F.kl_div(noisy, answers, reduction="none", log_target=True).sum(1)

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

    def batch(
        self,
        images: Tensor,
        labels: Tensor,
        indices: Tensor,
        *,
        epoch: int,
        augment: Callable[[Tensor], Tensor],
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """The images with their noise and random noise, augmented."""
        shown = images.float() / 255
        if self._memory.noise is not None:
            # A checkpoint is read to the CPU.
            self._memory.noise = self._memory.noise.to(indices.device)
            noise = self._memory.noise.index_select(0, indices)
            shown = (shown + noise * (self.clamp / (127 * 255))).clamp_(0, 1)
        return augment(self._with_random(shown, generator)), labels

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
        """The noise, once it is there."""
        memory = self._memory
        if memory.noise is None:
            return {}
        told = torch.tensor([memory.divergence, memory.seconds], dtype=torch.float64)
        return {"noise": memory.noise, "told": told}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        if "noise" in state:
            self._memory.noise = state["noise"]
            self._memory.divergence, self._memory.seconds = state["told"].tolist()

    def report(self) -> dict[str, Any]:
        """Mean size of the noise in 1/255, the mean KL divergence that it brought, and its seconds."""
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
