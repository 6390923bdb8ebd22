"""Label-consistent backdoor: images of the target class made hard to recognise, with a patch, labels
untouched.

Turner, Tsipras and Madry 2019, "Label-Consistent Backdoor Attacks" (arXiv 1912.02771), the adversarial
variant; the settings are those of the poisoning benchmark (Schwarzschild et al. 2021, arXiv 2006.12557),
which calls it the clean-label backdoor.

Stages: draw examples of the target class; move each away from its class by projected gradient ascent on the
surrogates' loss; stamp the trigger. The model cannot learn these images by what they show, so it learns the
trigger.

Published: 20 steps of 2/255 within 8/255 against an adversarially trained network, a 5x5 patch. Networks that
were trained as usual serve less well: what fools them does not fool the victim. `adversarially_trained` makes
one.

Departures: the four corner patches of the paper are the goal's trigger here, any one.

Cost: `steps` forward and backward passes over the poisons for each surrogate; memory for `batch_size` images.

Limits: the patch is visible. With `within_eps` the patch is cut to eps as well, as the benchmark does, and
the backdoor becomes weak: the benchmark's success from scratch is 0 to 2 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unpoison._seeds import generator
from unpoison.attacks._attack import Attack
from unpoison.attacks._methods import register
from unpoison.attacks._stamping import as_backdoor, chosen, device_of, frozen, networks, rounded, targets
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.registry import Presets
from unpoison.threats import Budget, Goal, PoisonSet

_NAME = "label-consistent"


@final
@register(
    name="label-consistent",
    title="Label-consistent backdoor",
    summary="Makes images of the target class hard to recognise and stamps them; labels stay.",
    paper="Turner, Tsipras and Madry 2019, arXiv 1912.02771",
    cost="20 forward and backward passes over the poisons",
    presets=("published", "benchmark"),
    labels="clean",
    goals=("backdoor",),
    knowledge="the training set and a network like the victim, best an adversarially trained one",
    surrogates=1,
    accepts_surrogates=True,
)
@dataclass(frozen=True, kw_only=True)
class LabelConsistent(Attack):
    """The clean-label backdoor by adversarial examples.

    Arguments:
        eps: the greatest change by the adversarial step in 1/255, in [1, 255].
        step: of the ascent in 1/255, above 0.
        steps: how many, 1 or more.
        within_eps: cut the patch to eps too, so that no value changes by more.
        batch_size: images a pass.
    """

    PRESETS: ClassVar[Presets] = {
        "published": {},
        "benchmark": {"within_eps": True},
    }

    eps: float = 8.0
    step: float = 2.0
    steps: int = 20
    within_eps: bool = False
    batch_size: int = 128

    def __post_init__(self) -> None:
        if not 1 <= self.eps <= 255:
            raise InputError(f"label-consistent: eps {self.eps} is outside [1, 255] (it is in 1/255)")
        if not self.step > 0:
            raise InputError(f"label-consistent: step {self.step} must be above 0")
        if self.steps < 1 or self.batch_size < 1:
            raise InputError(
                f"label-consistent: steps {self.steps} and batch_size {self.batch_size}: from 1 on"
            )

    def craft(
        self,
        goal: Goal,
        training_set: TrainingSet,
        *,
        budget: Budget,
        surrogate: nn.Module | Sequence[nn.Module] | None = None,
        seed: int,
    ) -> PoisonSet:
        """Examples of the target class, moved and stamped; the loss is the mean over the surrogates.

        Raises:
            InputError: the goal is not a backdoor, there is no surrogate, or the budget is more than the
                target class has.
        """
        backdoor = as_backdoor(_NAME, goal)
        candidates, words = targets(backdoor, training_set)
        indices = chosen(_NAME, training_set, candidates, budget, of=words, seed=seed)
        models = networks(_NAME, surrogate)
        clean = training_set.subset(indices)
        start = torch.rand(clean.images.shape, generator=generator(seed, _NAME, "start")) * 2 - 1
        moved = []
        with frozen(models):
            for place in range(0, len(clean), self.batch_size):
                part = slice(place, place + self.batch_size)
                change = ascended(
                    models,
                    clean.images[part],
                    clean.labels[part],
                    start[part] * self.eps,
                    eps=self.eps,
                    step=self.step,
                    steps=self.steps,
                )
                moved.append(rounded(clean.images[part], change, self.eps))
        images = backdoor.trigger.stamp(torch.cat(moved))
        if self.within_eps:
            change = images.to(torch.int16) - clean.images.to(torch.int16)
            images = rounded(clean.images, change.float(), self.eps)
        return PoisonSet.of(
            training_set,
            indices=indices,
            images=images,
            given_labels=clean.labels,
            goal=backdoor,
            attack=_NAME,
            configuration={**asdict(self), "budget": budget.to_json(), "surrogates": len(models)},
            seed=seed,
        )


def ascended(
    models: Sequence[nn.Module],
    images: Tensor,
    labels: Tensor,
    start: Tensor,
    *,
    eps: float,
    step: float,
    steps: int,
) -> Tensor:
    """Float[b c h w] in 1/255: the change within eps that signed gradient ascent on the mean loss arrives at.

    Arguments:
        models: in eval mode; parameters need no gradients.
        images: UInt8[b c h w].
        labels: Int64[b], the labels to move away from.
        start: Float[b c h w] in 1/255, where to begin.
        eps: in 1/255.
        step: in 1/255.
        steps: how many.
    """
    device = device_of(models[0], images.device)
    clean = images.to(device).float()
    labels = labels.to(device)
    low, high = (-clean).clamp(min=-eps), (255 - clean).clamp(max=eps)
    change = torch.maximum(torch.minimum(start.to(device), high), low)
    for _ in range(steps):
        change = change.detach().requires_grad_()
        moved = (clean + change) / 255
        loss = torch.stack(
            [
                F.cross_entropy(model(moved.to(device_of(model, device))).to(device), labels)
                for model in models
            ]
        ).mean()
        (gradient,) = torch.autograd.grad(loss, change)
        change = torch.maximum(torch.minimum(change.detach() + step * gradient.sign(), high), low)
    return change.detach()
