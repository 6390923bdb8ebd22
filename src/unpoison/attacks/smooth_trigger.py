"""Smooth trigger: a pattern without high frequencies, added to training images that get another label.

Zeng, Park, Mao and Jia 2021, "Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective" (ICCV;
arXiv 2104.03413), section 5.

Stages: from a surrogate and some training images build one pattern for all of them: take the smallest steps
that change the surrogate's predictions (DeepFool, Moosavi-Dezfooli et al. 2016, arXiv 1511.04599), add their
mean to the pattern, apply a Gaussian low-pass, scale to [0, reach], and repeat until enough predictions
change. Then add the pattern to examples of the source class and label them as the target.

Published: 100 images, reach 0.2 of the range, a Gaussian of width 30 over 30 pixels, stop at 20 % changed
predictions.

Departures: the paper visits one image after another, here all images step together in one batch; the paper
takes the class that most predictions change to as the target, here the goal names it.

Cost: for `rounds` rounds of at most `steps` steps, one backward pass for each class over `images` images;
memory for the activations of that batch and its gradients for all classes.

Limits: the poisons are mislabelled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unpoison._option_checks import PositiveFloat, PositiveInt
from unpoison._progress import Progress
from unpoison._seeds import generator
from unpoison.attacks._attack import Attack, CraftRequest
from unpoison.attacks._methods import register
from unpoison.attacks._networks import frozen
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.models import device_of, logits_of
from unpoison.threats import AdditiveTrigger, PoisonSet

_NAME = "smooth-trigger"
_OVERSHOOT = 1.02
_PUBLISHED_SIDE = 32


@final
@register(
    name="smooth-trigger",
    title="Smooth trigger",
    summary="Adds a pattern without high frequencies, made from a network, and labels as the target.",
    paper="Zeng, Park, Mao and Jia 2021, ICCV, arXiv 2104.03413",
    cost="some hundred backward passes over 100 images; none where the trigger is given",
    labels="dirty",
    goals=("backdoor",),
    knowledge="a share of the training set, with its labels, and a network like the victim",
    surrogates=1,
    accepts_surrogates=True,
    makes_trigger=True,
)
@dataclass(frozen=True, kw_only=True)
class SmoothTrigger(Attack):
    """The smooth additive backdoor.

    If the goal's trigger is an `AdditiveTrigger`, it is used and no surrogate is needed. Any other is
    replaced by the generated one; the goal of the poison set has the trigger that was used.

    Arguments:
        reach: the greatest value of the pattern in 1/255, in [1, 255]; the least is 0. Published: 51, a fifth
            of the range.
        images: how many training images to build the pattern from, 1 or more.
        fooling: stop once this share of their predictions has changed, in (0, 1].
        rounds: stop after so many rounds in any case, 1 or more.
        steps: of DeepFool in a round, 1 or more.
        width: of the Gaussian in pixels of an image 32 pixels wide, above 0; it scales with the image.
        kernel: the size of the Gaussian's kernel in such pixels, 1 or more.
    """

    reach: Annotated[float, "[1, 255]"] = 51.0
    images: PositiveInt = 100
    fooling: Annotated[float, "(0, 1]"] = 0.2
    rounds: PositiveInt = 10
    steps: PositiveInt = 10
    width: PositiveFloat = 30.0
    kernel: PositiveInt = 30

    def poison(self, request: CraftRequest) -> PoisonSet:
        """Relabelled examples with the pattern; of several surrogates the first is used.

        Raises:
            InputError: the budget is more than the source class has, there is neither a surrogate nor an
                additive trigger, or the surrogate's predictions do not depend on its inputs.
        """
        trigger = request.backdoor.trigger
        if not isinstance(trigger, AdditiveTrigger):
            trigger = self.generate(
                request.models[0], request.training_set, seed=request.seed, progress=request.progress
            )
        return request.relabelled(trigger)

    def generate(
        self,
        network: nn.Module,
        training_set: TrainingSet,
        *,
        seed: int,
        progress: Progress | None = None,
    ) -> AdditiveTrigger:
        """The pattern for one network, which is left as it was.

        Arguments:
            network: Float[b c h w] images in [0, 1] in, logits out.
            training_set: where the images to build it from are drawn.
            seed: of the draw.
            progress: called after every round, with the share of changed predictions before it as `achieved`.

        Raises:
            InputError: the network's predictions do not depend on its inputs.
        """
        drawn = torch.randperm(len(training_set), generator=generator(seed, _NAME, "images"))[: self.images]
        device = device_of(network, training_set.device)
        images = training_set.subset(drawn).images.to(device).float() / 255
        pattern = torch.zeros_like(images[:1])
        with frozen([network]):
            predicted = logits_of(network, images).argmax(1)
            for done in range(1, self.rounds + 1):
                stamped = (images + pattern).clamp(0, 1)
                same = logits_of(network, stamped).argmax(1) == predicted
                changed = float((~same).float().mean())
                if changed >= self.fooling:
                    break
                step = _deepfool(network, stamped[same], self.steps).mean(0, keepdim=True)
                smooth = self._smooth(pattern + step)
                low, high = smooth.amin(), smooth.amax()
                if not bool(high > low):
                    raise InputError(
                        f"{_NAME}: the surrogate's predictions do not depend on its inputs; "
                        f"give a trained network"
                    )
                pattern = (smooth - low) / (high - low) * (self.reach / 255)
                if progress is not None:
                    progress("craft", done, self.rounds, achieved=changed)
        if not bool(pattern.any()):
            raise InputError(f"{_NAME}: no step changes the surrogate's predictions; give a trained network")
        return AdditiveTrigger((pattern[0] * 255).round().to("cpu", torch.int16), "smooth")

    def _smooth(self, pattern: Tensor) -> Tensor:
        """Float[1 c h w] after the low-pass, separable, with reflected borders."""
        for dimension in (2, 3):
            side = pattern.shape[dimension]
            scale = side / _PUBLISHED_SIDE
            half = min(max(1, round(self.kernel * scale / 2)), side - 1)
            places = torch.arange(-half, half + 1, device=pattern.device, dtype=pattern.dtype)
            weights = (-0.5 * (places / (self.width * scale)).square()).exp()
            weights = weights / weights.sum()
            shape = (1, 1, -1, 1) if dimension == 2 else (1, 1, 1, -1)
            padding = (0, 0, half, half) if dimension == 2 else (half, half, 0, 0)
            padded = F.pad(pattern, padding, mode="reflect")
            channels = pattern.shape[1]
            kernel = weights.view(shape).expand(channels, 1, *weights.view(shape).shape[2:]).contiguous()
            pattern = F.conv2d(padded, kernel, groups=channels)
        return pattern


def _deepfool(network: nn.Module, images: Tensor, steps: int) -> Tensor:
    """Float[n c h w]: the small change of each image that DeepFool finds, zero where there is none."""
    change = torch.zeros_like(images)
    first: Tensor | None = None
    for _ in range(steps):
        moved = (images + change).requires_grad_()
        logits = logits_of(network, moved)
        classes = logits.shape[1]
        first = logits.argmax(1) if first is None else first
        unmoved = logits.argmax(1) == first
        if not bool(unmoved.any()):
            break
        gradients = torch.stack(
            [
                torch.autograd.grad(logits[:, label].sum(), moved, retain_graph=label + 1 < classes)[0]
                for label in range(classes)
            ],
            1,
        )
        rows = torch.arange(len(images), device=images.device)
        slopes = (gradients - gradients[rows, first][:, None]).flatten(2)
        gaps = (logits - logits[rows, first][:, None]).detach().abs()
        lengths = slopes.norm(dim=2)
        distances = torch.where(lengths > 0, gaps / lengths.clamp(min=1e-12), torch.inf)
        distances[rows, first] = torch.inf
        nearest = distances.argmin(1)
        reachable = distances[rows, nearest].isfinite() & unmoved
        length = lengths[rows, nearest].clamp(min=1e-12)
        # The small constant is for gaps of zero.
        amount = (gaps[rows, nearest] + 1e-4) / length.square() * _OVERSHOOT
        step = slopes[rows, nearest] * torch.where(reachable, amount, 0)[:, None]
        change = change + step.view_as(change)
    return change
