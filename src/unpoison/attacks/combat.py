"""COMBAT: noise that a generator, trained in turn with a surrogate, makes of each image; labels are kept.

Huynh, Nguyen, Pham and Tran 2024, "COMBAT: Alternated Training for Effective Clean-Label Backdoor Attacks"
(AAAI 38, 2436-2444).

Stages: in turn, train a surrogate on the set in which examples of the target class bear the generator's
noise, and train the generator so that this surrogate predicts every image with its noise as the target, while
a clean network still predicts the image's own class (else the noise would be an adversarial example, which
needs no poison); the noise is small and has no high frequencies. Then give examples of the target class their
noise.

Published (CIFAR-10): half of the target class, which is 5 % of the set, and noise of at most 0.08 of the
range, 20.4/255.

Departures: the generator is a small network without batch norm, so that a trigger is a function of one image;
the surrogate is the given one with new parameters, trained at a constant rate, and the given ones are the
clean networks. The weights of the losses, the share of frequencies and the numbers of epochs are ours. A
batch of the surrogate has noise on the poisons alone, which are drawn once.

Cost: for each epoch a training step and a generator step of each batch, about five passes over the set.
Memory: the activations of a batch in the surrogate, each clean network and the generator.

Limits: needs many poisons of the target class; noise of 20/255 is visible on flat images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor

from unpoison._option_checks import NonNegativeFloat, PositiveFloat, PositiveInt
from unpoison._stable import cross_entropy
from unpoison.attacks._attack import Attack, CraftRequest
from unpoison.attacks._inner_network import InnerNetwork, batches
from unpoison.attacks._methods import register
from unpoison.attacks._networks import frozen
from unpoison.models import device_of, logits_of
from unpoison.registry import Presets
from unpoison.threats import GeneratedNoiseTrigger, PoisonSet, generator_weights, noise_of


@final
@register(
    name="combat",
    title="COMBAT",
    summary="Adds noise that a generator makes of each image to examples of the target class; labels stay.",
    paper="Huynh, Nguyen, Pham and Tran 2024, AAAI",
    cost="training a network and a generator in turn, about five passes over the set an epoch",
    presets=("published", "sample"),
    labels="clean",
    goals=("backdoor",),
    knowledge="the training set and a network like the victim",
    surrogates=1,
    accepts_surrogates=True,
    makes_trigger=True,
)
@dataclass(frozen=True, kw_only=True)
class Combat(Attack):
    """The clean-label backdoor by a trained generator.

    If the goal's trigger is a `GeneratedNoiseTrigger`, it is used and nothing is trained. Any other is
    replaced by the generated one; the goal of the poison set has the trigger that was used.

    Arguments:
        eps: the greatest change in 1/255, in [1, 255].
        low_pass: the share of the frequencies each way that the noise has, in (0, 1].
        epochs: passes over the training set, 1 or more.
        learning_rate: of the surrogate, above 0.
        generator_rate: of the generator (Adam), above 0.
        clean_weight: of the clean networks' loss, 0 or more.
        size_weight: of the mean square of the noise, 0 or more.
        width: of the generator's first convolution, 1 or more.
        batch_size: images in a step, 2 or more.
    """

    PRESETS: ClassVar[Presets] = {
        "published": {},
        "sample": {"epochs": 10, "learning_rate": 0.05, "batch_size": 64},
    }

    eps: Annotated[float, "[1, 255]"] = 20.4
    low_pass: Annotated[float, "(0, 1]"] = 0.65
    epochs: PositiveInt = 100
    learning_rate: PositiveFloat = 0.01
    generator_rate: PositiveFloat = 0.001
    clean_weight: NonNegativeFloat = 0.8
    size_weight: NonNegativeFloat = 0.02
    width: PositiveInt = 16
    batch_size: Annotated[int, "[2, inf)"] = 128

    def poison(self, request: CraftRequest) -> PoisonSet:
        """Examples of the target class with their noise.

        Raises:
            InputError: the budget is more than the target class has; there is neither a surrogate nor a
                trigger of this kind, or the surrogate's parameters cannot be reset.
        """
        indices, trigger = request.draw_targets(), request.backdoor.trigger
        if not isinstance(trigger, GeneratedNoiseTrigger):
            trigger = self._trained(request, indices)
        clean, goal = request.training_set.subset(indices), request.with_trigger(trigger)
        return request.poison_set(
            indices=indices, images=trigger.stamp(clean.images), labels=clean.labels, goal=goal
        )

    def _trained(self, request: CraftRequest, indices: Tensor) -> GeneratedNoiseTrigger:
        inner, models = InnerNetwork(request, learning_rate=self.learning_rate), request.models
        device, target = inner.device, request.backdoor.target
        training_set = request.training_set.to(device)
        channels = training_set.image_shape[0]
        weights = generator_weights(channels, channels, self.width, draws=request.generator("generator"))
        weights = weights.to(device).requires_grad_()
        optimizer = torch.optim.Adam([weights], lr=self.generator_rate)
        poisoned = torch.zeros(len(training_set), dtype=torch.bool, device=device)
        poisoned[indices.to(device)] = True
        order = batches(len(training_set), self.batch_size, request.generator("batches"))
        in_epoch = -(-len(training_set) // self.batch_size)
        for epoch in range(self.epochs):
            for _ in range(in_epoch):
                rows = next(order).to(device)
                images, labels = training_set.images[rows].float() / 255, training_set.labels[rows]
                if len(rows) > 1:  # batch norm needs two
                    with torch.no_grad():
                        seen = torch.where(
                            poisoned[rows].view(-1, 1, 1, 1), self._noisy(images, weights)[0], images
                        )
                    with inner.training() as network:
                        inner.step(F.cross_entropy(logits_of(network, seen), labels))
                with inner.frozen() as network, frozen(models):
                    noisy, noise = self._noisy(images, weights)
                    reached = cross_entropy(logits_of(network, noisy), torch.full_like(labels, target))
                    clean = torch.stack(
                        [
                            cross_entropy(logits_of(one, noisy.to(device_of(one, device))).to(device), labels)
                            for one in models
                        ]
                    ).mean()
                    loss = reached + self.clean_weight * clean + self.size_weight * noise.square().mean()
                    (weights.grad,) = torch.autograd.grad(loss, weights)
                optimizer.step()
            request.report(epoch + 1, self.epochs, loss=loss.detach())
        return GeneratedNoiseTrigger(
            weights.detach().cpu(), channels, self.width, self.eps, self.low_pass, "combat"
        )

    def _noisy(self, images: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Float[b c h w] in [0, 1] with their noise, and the noise in [-1, 1]."""
        noise = noise_of(images, weights, width=self.width, low_pass=self.low_pass)
        return (images + noise * (self.eps / 255)).clamp(0, 1), noise
