"""Input-aware: a generator makes the trigger of each image, and the trigger of another image does nothing.

Nguyen and Tran 2020, "Input-Aware Dynamic Backdoor Attack" (NeurIPS; arXiv 2010.08138).

Stages: train a network that makes a mask of each image, sparse and different for different images; train a
classifier and a network that makes patterns together: images with their own pattern are to be predicted as
wanted, images with the pattern of another image as their own class, and patterns are to differ as much as
images do. Then give poisons their own pattern and the wanted label, and covers the pattern of another image
and their own label.

Why this attack stands for those with generated triggers: ISSBA (Li et al. 2021, arXiv 2012.03816) encodes a
text by a steganography network that is trained with a perceptual loss, and so needs a network pretrained
elsewhere; all parts of this one are trained on the training set.

Published (CIFAR-10): 10 % poisons, 10 % covers, masks of a density of 0.032; the attack succeeds on 99.3 % of
images at 94.7 % clean accuracy, and 88.2 % of images with the pattern of another keep their class.

Departures: the paper's adversary trains the victim itself, jointly with the generator, and draws poisons anew
in each batch; here the classifier is the adversary's own (the architecture of the surrogate), and poisons and
covers are part of the training set. The budget is what the adversary changes: the published rates are
`Budget(share=0.2)`. The generators are small and have no batch norm. Weights of losses, rates and numbers of
epochs are ours where they are not stated above.

Cost: `mask_epochs` passes of a small network over the set, and for each of `epochs` a training step of each
batch with the generators in front, about two trainings.

Limits: the poisons are mislabelled, and patterns are visible.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor

from unpoison._option_checks import NonNegativeFloat, PositiveFloat, PositiveInt
from unpoison.attacks._attack import Attack, CraftRequest
from unpoison.attacks._covers import draw_with_covers, poison_set_with_covers
from unpoison.attacks._inner_network import InnerNetwork, batches
from unpoison.attacks._methods import register
from unpoison.data import TrainingSet
from unpoison.models import logits_of
from unpoison.registry import Presets
from unpoison.threats import (
    GeneratedPatternTrigger,
    PoisonSet,
    generator_weights,
    mask_of,
    pattern_of,
    with_pattern,
)


@final
@register(
    name="input-aware",
    title="Input-aware dynamic backdoor",
    summary="Gives each poison a pattern made of it, and covers, whose labels stay, that of another image.",
    paper="Nguyen and Tran 2020, NeurIPS, arXiv 2010.08138",
    cost="training two small generators, one of them with a classifier",
    presets=("published", "sample"),
    labels="dirty",
    goals=("backdoor",),
    knowledge="the training set and an architecture like the victim's",
    surrogates=1,
    accepts_surrogates=True,
    makes_trigger=True,
)
@dataclass(frozen=True, kw_only=True)
class InputAware(Attack):
    """The backdoor with a trigger for each image.

    If the goal's trigger is a `GeneratedPatternTrigger`, it is used and nothing is trained. Any other is
    replaced by the generated one; the goal of the poison set has the trigger that was used.

    Arguments:
        cover_ratio: covers for each poison, 0 or more; both count in the budget. There is always one poison.
        density: the mean of a mask above which it is penalised, in (0, 1].
        mask_epochs: passes over the set in which masks are learned, 1 or more.
        epochs: passes over the set in which patterns are learned, 1 or more.
        share: of a batch that gets its own pattern, and as much that gets another's, in (0, 0.5].
        learning_rate: of the classifier, above 0.
        generator_rate: of the generators (Adam), above 0.
        diversity: the weight of the loss by which patterns and masks differ, 0 or more.
        width: of the generators' first convolution, 1 or more.
        batch_size: images in a step, 4 or more.
    """

    PRESETS: ClassVar[Presets] = {
        "published": {},
        "sample": {"mask_epochs": 2, "epochs": 8, "learning_rate": 0.05, "batch_size": 64, "width": 8},
    }

    cover_ratio: NonNegativeFloat = 1.0
    density: Annotated[float, "(0, 1]"] = 0.032
    mask_epochs: PositiveInt = 25
    epochs: PositiveInt = 60
    share: Annotated[float, "(0, 0.5]"] = 0.1
    learning_rate: PositiveFloat = 0.01
    generator_rate: PositiveFloat = 0.003
    diversity: NonNegativeFloat = 1.0
    width: PositiveInt = 16
    batch_size: Annotated[int, "[4, inf)"] = 128

    def poison(self, request: CraftRequest) -> PoisonSet:
        """Relabelled poisons with their own patterns, and covers with the patterns of others.

        Raises:
            InputError: the poisons or covers are more than there are; there is neither a surrogate nor a
                trigger of this kind, or the surrogate's parameters cannot be reset.
        """
        poisons, covers = draw_with_covers(request, self.cover_ratio)
        trigger, training_set = request.triggered.trigger, request.training_set
        if not isinstance(trigger, GeneratedPatternTrigger):
            trigger = self._trained(request)
        partners = torch.randint(len(training_set), (len(covers),), generator=request.generator("partners"))
        stamped = trigger.stamp(training_set.subset(poisons).images)
        crossed = trigger.stamp_of(training_set.subset(covers).images, training_set.subset(partners).images)
        goal = request.with_trigger(trigger)
        return poison_set_with_covers(
            request, poisons, covers, images=torch.cat((stamped, crossed)), goal=goal
        )

    @torch.enable_grad()
    def _trained(self, request: CraftRequest) -> GeneratedPatternTrigger:
        inner = InnerNetwork(request, learning_rate=self.learning_rate)
        training_set = request.training_set.to(inner.device)
        channels = training_set.image_shape[0]
        made = {
            name: generator_weights(channels, outputs, self.width, draws=request.generator(name))
            .to(inner.device)
            .requires_grad_()
            for name, outputs in (("mask", 1), ("pattern", channels))
        }
        order = batches(len(training_set), self.batch_size, request.generator("batches"))
        in_epoch, total = -(-len(training_set) // self.batch_size), self.mask_epochs + self.epochs
        optimizer = torch.optim.Adam([made["mask"]], lr=self.generator_rate)
        for epoch in range(self.mask_epochs):
            for _ in range(in_epoch):
                images = _floats(training_set, next(order))
                mask = mask_of(images, made["mask"], width=self.width)
                dense = F.relu(mask - self.density).mean()
                loss = 100 * dense + self.diversity * _diversity(images, mask)
                (made["mask"].grad,) = torch.autograd.grad(loss, made["mask"])
                optimizer.step()
            request.report(epoch + 1, total, loss=loss.detach())
        optimizer = torch.optim.Adam([made["pattern"]], lr=self.generator_rate)
        for epoch in range(self.mask_epochs, total):
            for _ in range(in_epoch):
                rows = next(order)
                if len(rows) < 4:
                    continue
                loss = self._learn(request, inner, training_set, rows, made)
                optimizer.step()
            request.report(epoch + 1, total, loss=loss.detach())
        weights = {name: one.detach().cpu() for name, one in made.items()}
        return GeneratedPatternTrigger(
            weights["pattern"], weights["mask"], channels, self.width, "input-aware"
        )

    def _learn(
        self,
        request: CraftRequest,
        inner: InnerNetwork,
        training_set: TrainingSet,
        rows: Tensor,
        made: dict[str, Tensor],
    ) -> Tensor:
        """A step of the classifier, and the gradient of the patterns' weights; gives the loss."""
        images, labels = _floats(training_set, rows), training_set.labels[rows.to(training_set.device)]
        count = max(1, round(self.share * len(rows)))
        # The batch is in a random order: its ends are as good as any part.
        own, others = images[:count], images.flip(0)[:count]
        made["pattern"].grad = None
        stamped = with_pattern(own, own, made["pattern"], made["mask"].detach(), width=self.width)
        crossed = with_pattern(
            images[count : 2 * count], others, made["pattern"], made["mask"].detach(), width=self.width
        )
        seen = torch.cat((stamped, crossed, images[2 * count :]))
        wanted = torch.cat((request.triggered.wanted(labels[:count]), labels[count:]))
        patterns = pattern_of(images, made["pattern"], width=self.width)
        with inner.training() as network:
            loss = F.cross_entropy(logits_of(network, seen), wanted)
            inner.step(loss + self.diversity * _diversity(images, patterns))
        return loss


def _floats(training_set: TrainingSet, rows: Tensor) -> Tensor:
    return training_set.images[rows.to(training_set.device)].float() / 255


def _diversity(images: Tensor, made: Tensor) -> Tensor:
    """A scalar: how far apart images are over how far apart what is made of them is, in pairs; the mean."""
    apart = (images - images.roll(1, 0)).flatten(1).norm(dim=1) / images[0].numel() ** 0.5
    kept = (made - made.roll(1, 0)).flatten(1).norm(dim=1) / made[0].numel() ** 0.5
    ratio: Tensor = (apart / (kept + 1e-3)).mean()
    return ratio
