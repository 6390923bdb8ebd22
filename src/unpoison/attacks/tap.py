"""TAP: targeted adversarial examples as poison; training on them teaches the features of other classes.

Fowl, Goldblum, Chiang, Geiping, Czaja and Goldstein 2021, "Adversarial Examples Make Strong Poisons"
(NeurIPS; arXiv 2106.10807), the class-targeted attack.

Stages: on a network trained on the clean set, move every poison within eps until it is predicted as another
class, the same for all examples of its class, by projected gradient descent on augmented copies; the labels
stay. The network sees the features of the next class in every poison, so a victim learns them under the wrong
label, and predicts images of that class wrongly.

Published (CIFAR-10, all examples poisoned): eps 8/255, 250 steps, classes permuted by a fixed permutation,
here label + 1. The preset "sample" is ours: fewer and larger steps.

Departures: one start, which is no change; the step size is ours. Augmentation as in gradient matching.

Cost: `steps` forward and backward passes over the poisons for each surrogate; memory for `batch_size` images.

Limits: where part of the set is clean, victims learn from that part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, final

import torch
from torch import Tensor

from unpoison._option_checks import NonNegativeInt, PositiveFloat, PositiveInt
from unpoison._seeds import derive_seed
from unpoison._stable import cross_entropy
from unpoison.attacks._attack import Attack, CraftRequest
from unpoison.attacks._methods import register
from unpoison.attacks._networks import frozen
from unpoison.attacks._signed_descent import Augmentation, view_of_step
from unpoison.models import device_of, logits_of
from unpoison.registry import Presets
from unpoison.threats import LInf, PoisonSet


@final
@register(
    name="tap",
    title="TAP",
    summary="Makes examples adversarial towards the next class, so that labels mean other features.",
    paper="Fowl, Goldblum, Chiang, Geiping, Czaja and Goldstein 2021, NeurIPS, arXiv 2106.10807",
    cost="250 forward and backward passes over the poisons",
    presets=("published", "sample"),
    labels="clean",
    goals=("availability",),
    knowledge="the whole training set and a network like the victim",
    surrogates=1,
    accepts_surrogates=True,
)
@dataclass(frozen=True, kw_only=True)
class TAP(Attack):
    """Availability poison by targeted adversarial examples.

    Arguments:
        eps: the greatest change in 1/255, in [1, 255].
        steps: of the descent, 1 or more.
        step_size: in 1/255, above 0.
        shift_of_labels: examples of class y are moved towards class y + this, modulo the classes; 1 or more.
        augmentation: of every poison in every step; as `GradientMatching`.
        shift: the largest shift in pixels, 0 or more.
        flip: mirror half of the images.
        batch_size: images in a pass, 1 or more.
    """

    PRESETS: ClassVar[Presets] = {
        "published": {},
        "sample": {"steps": 40, "step_size": 0.8, "augmentation": "crop", "shift": 1},
    }

    eps: Annotated[float, "[1, 255]"] = 8.0
    steps: PositiveInt = 250
    step_size: PositiveFloat = 0.25
    shift_of_labels: PositiveInt = 1
    augmentation: Augmentation = "translate"
    shift: NonNegativeInt = 4
    flip: bool = True
    batch_size: PositiveInt = 128

    def poison(self, request: CraftRequest) -> PoisonSet:
        """Examples of all classes, moved; the loss is the mean over the surrogates.

        Raises:
            InputError: there is no surrogate.
        """
        models, training_set = request.models, request.training_set
        indices = request.draw(torch.arange(len(training_set)), training_set.name)
        chosen = training_set.subset(indices)
        aims = (chosen.labels + self.shift_of_labels) % chosen.num_classes
        moved = []
        with frozen(models):
            for start in range(0, len(chosen), self.batch_size):
                part = slice(start, start + self.batch_size)
                seed = request.derived_seed("views", start)
                moved.append(self._moved(models, chosen.images[part], aims[part], seed))
                request.report(min(start + self.batch_size, len(chosen)), len(chosen))
        return request.poison_set(indices=indices, images=torch.cat(moved), labels=chosen.labels)

    def _moved(self, models: tuple[torch.nn.Module, ...], images: Tensor, aims: Tensor, seed: int) -> Tensor:
        """UInt8[b c h w]: images moved towards the classes Int64[b]."""
        device = device_of(models[0], images.device)
        clean, aims = images.to(device).float(), aims.to(device)
        low, high = (-clean).clamp(min=-self.eps), (255 - clean).clamp(max=self.eps)
        change = torch.zeros_like(clean)
        for step in range(self.steps):
            change.requires_grad_()
            view = view_of_step(
                self.augmentation, shift=self.shift, flip=self.flip, seed=derive_seed(seed, step)
            )
            seen = view((clean + change) / 255, 0)
            loss = torch.stack(
                [
                    cross_entropy(logits_of(model, seen.to(device_of(model, device))).to(device), aims)
                    for model in models
                ]
            ).mean()
            (slope,) = torch.autograd.grad(loss, change)
            change = change.detach() - self.step_size * slope.sign()
            change = torch.maximum(torch.minimum(change, high), low)
        return LInf(self.eps).rounded(images, {"delta": change.to(images.device)})
