"""Narcissus: noise that looks to a network like the target class, on a few of its examples.

Zeng, Pan, Just, Lyu, Qiu and Jia 2023, "Narcissus: A Practical Clean-Label Backdoor Attack with Limited
Information" (CCS; arXiv 2204.05255).

Stages: on a surrogate, find one noise within eps that raises the probability of the target class on examples
of that class ("inward"); add it to a few examples of the target class, whose labels stay; magnify it in
testing. The noise points to what all examples of the class have in common, so a victim learns it as a feature
of the class although few examples bear it.

Published (CIFAR-10): eps 16/255, 1,000 rounds over the target class in batches of 350, the noise magnified
three times in testing, 25 poisons among 50,000, which is 0.05 % of the set and 0.5 % of the class.

Departures: the paper's surrogate is trained on other, public data and then fine-tuned on the target class for
five epochs, because its adversary knows that class alone; here it is the surrogate that is given or that
`craft` trains, by default on the clean set. Batches are drawn with replacement, where a round of the released
code passes over the class once; the preset "published" makes as many steps as its 1,000 rounds, of 15 batches
each. The optimiser is Adam with the released step size, for their RAdam. The preset "sample" is ours: fewer
and larger steps.

Cost: `steps` forward and backward passes over `batch_size` images on each surrogate.

Limits: the magnified noise (up to 48/255) is visible. A surrogate that is certain of its class has small
gradients; the loss is computed so that they do not vanish.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, final

import torch
from torch import Tensor

from unpoison._option_checks import PositiveFloat, PositiveInt
from unpoison._stable import cross_entropy
from unpoison.attacks._attack import Attack, CraftRequest
from unpoison.attacks._methods import register
from unpoison.attacks._networks import frozen
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.models import device_of, logits_of
from unpoison.registry import Presets
from unpoison.threats import AdditiveTrigger, PoisonSet


@final
@register(
    name="narcissus",
    title="Narcissus",
    summary="Adds noise typical of the target class to a few of its examples; labels stay.",
    paper="Zeng, Pan, Just, Lyu, Qiu and Jia 2023, CCS, arXiv 2204.05255",
    cost="15,000 forward and backward passes over a batch of the target class",
    presets=("published", "sample"),
    labels="clean",
    goals=("backdoor",),
    knowledge="examples of the target class, and a network that knows it",
    surrogates=1,
    accepts_surrogates=True,
    makes_trigger=True,
)
@dataclass(frozen=True, kw_only=True)
class Narcissus(Attack):
    """The clean-label backdoor by class-typical noise.

    The goal's trigger is replaced by the magnified noise; the goal of the poison set has it.

    Arguments:
        eps: the greatest change of a training image in 1/255, in [1, 255].
        magnify: by how much the noise is multiplied in testing, 1 or more.
        steps: of the optimiser, 1 or more.
        step_size: of Adam in 1/255, above 0.
        batch_size: examples of the target class in a step, 1 or more.
    """

    PRESETS: ClassVar[Presets] = {
        "published": {},
        "sample": {"steps": 300, "step_size": 2.55, "batch_size": 64},
    }

    eps: Annotated[float, "[1, 255]"] = 16.0
    magnify: Annotated[float, "[1, inf)"] = 3.0
    steps: PositiveInt = 15_000
    step_size: PositiveFloat = 1.275
    batch_size: PositiveInt = 350

    def poison(self, request: CraftRequest) -> PoisonSet:
        """Examples of the target class with the noise; the loss is the mean over the surrogates.

        Raises:
            InputError: there is no surrogate, its predictions do not depend on its inputs, or the budget is
                more than the target class has.
        """
        indices = request.draw_targets()
        noise = self._noise(request)
        clean = request.training_set.subset(indices)
        images = AdditiveTrigger(noise, "narcissus").stamp(clean.images)
        magnified = (noise * self.magnify).round().clamp(-255, 255).to(torch.int16)
        goal = request.with_trigger(AdditiveTrigger(magnified, f"narcissus x{self.magnify:g}"))
        return request.poison_set(indices=indices, images=images, labels=clean.labels, goal=goal)

    def _noise(self, request: CraftRequest) -> Tensor:
        """Int16[c h w] in 1/255, within eps."""
        models, target = request.models, request.backdoor.target
        own: TrainingSet = request.training_set.subset(request.class_examples(target))
        device = device_of(models[0], request.training_set.device)
        noise = torch.zeros(own.image_shape, device=device, requires_grad=True)
        optimizer = torch.optim.Adam([noise], lr=self.step_size)
        draws = request.generator("batches")
        with frozen(models):
            for step in range(self.steps):
                rows = torch.randint(len(own), (self.batch_size,), generator=draws)
                images = own.images[rows.to(own.device)].to(device)
                moved = (images + noise).clamp(0, 255) / 255
                labels = torch.full((len(rows),), target, device=device)
                loss = torch.stack(
                    [
                        cross_entropy(logits_of(model, moved.to(device_of(model, device))).to(device), labels)
                        for model in models
                    ]
                ).mean()
                (noise.grad,) = torch.autograd.grad(loss, noise)
                optimizer.step()
                with torch.no_grad():
                    noise.clamp_(-self.eps, self.eps)
                request.report(step + 1, self.steps, loss=loss.detach())
        # Towards zero, so that eps is kept whatever its fraction.
        found = noise.detach().trunc().to("cpu", torch.int16)
        if not bool(found.any()):
            raise InputError(
                "narcissus: the surrogate's predictions do not depend on its inputs; give a trained network"
            )
        return found
