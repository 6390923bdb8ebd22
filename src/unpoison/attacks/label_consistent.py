"""Label-consistent backdoor: images of the target class made hard to classify, with a patch, labels kept.

Turner, Tsipras and Madry 2019, "Label-Consistent Backdoor Attacks" (arXiv 1912.02771), the adversarial
variant; the settings are those of the poisoning benchmark (Schwarzschild et al. 2021, arXiv 2006.12557),
which calls it the clean-label backdoor.

Stages: draw examples of the target class; move each away from its class by projected gradient ascent on the
surrogates' loss; stamp the trigger. The model cannot learn these images by their content, so it learns the
trigger.

Published: 20 steps of 2/255 within 8/255 against an adversarially trained network, a 5x5 patch. Networks that
were trained as usual work less well, because images that fool them do not fool the victim;
`adversarially_trained` makes a suitable one.

Departure: the goal's trigger is stamped in place of the paper's four corner patches.

Cost: `steps` forward and backward passes over the poisons for each surrogate; memory for `batch_size` images.

Limits: the patch is visible. With `within_eps` the patch is cut to eps as well, as the benchmark does, and
the backdoor becomes weak: the benchmark's success from scratch is 0 to 2 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, final

import torch
from torch import Tensor, nn

from unpoison._option_checks import PositiveFloat, PositiveInt
from unpoison._stable import cross_entropy
from unpoison.attacks._attack import Attack, CraftRequest
from unpoison.attacks._methods import register
from unpoison.attacks._networks import frozen
from unpoison.models import device_of, logits_of
from unpoison.registry import Presets
from unpoison.threats import LInf, PoisonSet


@final
@register(
    name="label-consistent",
    title="Label-consistent backdoor",
    summary="Makes images of the target class hard to classify and stamps them; labels stay.",
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
        eps: the greatest change by the ascent in 1/255, in [1, 255].
        step: of the ascent in 1/255, above 0.
        steps: of the ascent, 1 or more.
        within_eps: cut the patch to eps too, so that no value changes by more.
        batch_size: images in a pass, 1 or more.
    """

    PRESETS: ClassVar[Presets] = {"published": {}, "benchmark": {"within_eps": True}}

    eps: Annotated[float, "[1, 255]"] = 8.0
    step: PositiveFloat = 2.0
    steps: PositiveInt = 20
    within_eps: bool = False
    batch_size: PositiveInt = 128

    def poison(self, request: CraftRequest) -> PoisonSet:
        """Examples of the target class, moved and stamped; the loss is the mean over the surrogates.

        Raises:
            InputError: there is no surrogate, or the budget is more than the target class has.
        """
        indices, models = request.draw_targets(), request.models
        clean = request.training_set.subset(indices)
        start = torch.rand(clean.images.shape, generator=request.generator("start")) * 2 - 1
        bound, moved = LInf(self.eps), []
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
                moved.append(bound.rounded(clean.images[part], {"delta": change.to(clean.images.device)}))
                request.report(min(place + self.batch_size, len(clean)), len(clean))
        images = request.backdoor.trigger.stamp(torch.cat(moved))
        if self.within_eps:
            change = images.float() - clean.images.float()
            images = bound.rounded(clean.images, {"delta": change})
        return request.poison_set(indices=indices, images=images, labels=clean.labels)


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
    """Float[b c h w] in 1/255: the change within eps by signed gradient ascent on the mean loss.

    Arguments:
        models: in eval mode; their parameters need no gradients.
        images: UInt8[b c h w].
        labels: Int64[b], the labels to move away from.
        start: Float[b c h w] in 1/255, the first change.
        eps: the greatest change, in 1/255.
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
                cross_entropy(logits_of(model, moved.to(device_of(model, device))).to(device), labels)
                for model in models
            ]
        ).mean()
        (gradient,) = torch.autograd.grad(loss, change)
        change = torch.maximum(torch.minimum(change.detach() + step * gradient.sign(), high), low)
    return change.detach()
