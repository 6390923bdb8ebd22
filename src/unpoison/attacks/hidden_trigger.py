"""Hidden-trigger backdoor: images of the target class with the features of patched images of the source.

Saha, Subramanya and Pirsiavash 2020, "Hidden Trigger Backdoor Attacks" (AAAI; arXiv 1910.00033).

Stages: draw poisons among the target class, and as many images of the source class, which get the trigger;
pair poisons and patched sources that are close in the surrogate's features; move each poison, within eps,
towards its partner's features. No training image has the trigger. The features are the input of the last
linear layer.

Published: eps 16/255, batches of 100, 5,000 steps of plain gradient descent with rate 0.01, times 0.95 every
2,000 steps; the preset "benchmark" has the poisoning benchmark's rate 0.001 and eps 8/255. The paper puts the
patch at a random place in each image, `RandomPatchTrigger`; the benchmark at (22, 22) of 32, `PatchTrigger`.

Departures: partners are matched every `match_every` steps, not every step, and by the least total distance
instead of greedily.

Cost: `steps` forward and backward passes over the poisons; memory for `batch_size` images.

Limits: made for victims that fine-tune the surrogate's own features; from scratch the benchmark found a
success of 0 to 4 %.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, final

import torch
from torch import Tensor, nn

from unpoison._option_checks import PositiveFloat, PositiveInt
from unpoison.attacks._attack import Attack, CraftRequest
from unpoison.attacks._feature_space import FeatureReader
from unpoison.attacks._methods import register
from unpoison.attacks._networks import frozen
from unpoison.models import device_of
from unpoison.registry import Presets
from unpoison.threats import LInf, PoisonSet


@final
@register(
    name="hidden-trigger",
    title="Hidden-trigger backdoor",
    summary="Gives images of the target class the features of patched images of the source.",
    paper="Saha, Subramanya and Pirsiavash 2020, AAAI, arXiv 1910.00033",
    cost="5,000 forward and backward passes over the poisons",
    presets=("published", "benchmark"),
    labels="clean",
    goals=("backdoor",),
    knowledge="the training set and the network that the victim fine-tunes",
    surrogates=1,
    accepts_surrogates=True,
)
@dataclass(frozen=True, kw_only=True)
class HiddenTrigger(Attack):
    """The clean-label backdoor by feature collision with patched sources.

    Arguments:
        eps: the greatest change in 1/255, in [1, 255].
        steps: of gradient descent, 1 or more.
        learning_rate: in units of the whole range for a unit of gradient, above 0.
        decay: what the rate is multiplied by every 2,000 steps, in (0, 1].
        match_every: steps between two matchings, 1 or more.
        batch_size: poisons that are moved, and matched, together.
        layer: the module whose output is matched; None is the input of the last linear layer.
    """

    PRESETS: ClassVar[Presets] = {"published": {}, "benchmark": {"eps": 8.0, "learning_rate": 0.001}}

    eps: Annotated[float, "[1, 255]"] = 16.0
    steps: PositiveInt = 5000
    learning_rate: PositiveFloat = 0.01
    decay: Annotated[float, "(0, 1]"] = 0.95
    match_every: PositiveInt = 50
    batch_size: PositiveInt = 100
    layer: str | None = None

    def poison(self, request: CraftRequest) -> PoisonSet:
        """Examples of the target class, moved towards patched sources; several surrogates' losses are summed.

        Raises:
            InputError: there is no surrogate or no image of the source class, the budget is more than the
                target class has, or `layer` is not one of the surrogate's.
        """
        goal, training_set = request.backdoor, request.training_set
        indices, models = request.draw_targets(), request.models
        reader = FeatureReader(request.name, models, () if self.layer is None else (self.layer,))
        pool = request.source_examples()
        draws = request.generator("sources")
        clean = training_set.subset(indices)
        images = []
        parts = torch.split(clean.images, self.batch_size)
        with frozen(models):
            for number, part in enumerate(parts):
                drawn = pool[torch.randint(len(pool), (len(part),), generator=draws)]
                if len(pool) >= len(part):
                    drawn = pool[torch.randperm(len(pool), generator=draws)[: len(part)]]
                patched = goal.trigger.stamp(training_set.subset(drawn).images)

                def report(step: int, loss: Tensor, before: int = number * self.steps) -> None:
                    request.report(before + step, len(parts) * self.steps, loss=loss)

                change = self._move(models, reader, part, patched, report)
                images.append(LInf(self.eps).rounded(part, {"delta": change.to(part.device)}))
        return request.poison_set(indices=indices, images=torch.cat(images), labels=clean.labels)

    def _move(
        self,
        models: Sequence[nn.Module],
        reader: FeatureReader,
        images: Tensor,
        patched: Tensor,
        report: Callable[[int, Tensor], None],
    ) -> Tensor:
        """Float[b c h w] in 1/255: the change within eps that moves the images towards patched sources."""
        device = device_of(models[0], images.device)
        clean = images.to(device).float() / 255
        with torch.no_grad():
            wanted = reader(patched.to(device).float() / 255)
        eps = self.eps / 255
        low, high = (-clean).clamp(min=-eps), (1 - clean).clamp(max=eps)
        change = torch.zeros_like(clean)
        partners = torch.arange(len(clean), device=device)
        for step in range(self.steps):
            change.requires_grad_()
            found = reader(clean + change)
            if step % self.match_every == 0:
                partners = nearest_partners(found, wanted).to(device)
            losses = [
                (own - theirs[partners]).square().sum() for own, theirs in zip(found, wanted, strict=True)
            ]
            loss = torch.stack(losses).sum()
            (gradient,) = torch.autograd.grad(loss, change)
            rate = self.learning_rate * self.decay ** (step // 2000)
            change = torch.maximum(torch.minimum(change.detach() - rate * gradient, high), low)
            report(step + 1, loss.detach())
        return change.detach() * 255


def nearest_partners(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Int64[b]: a partner for each row, each used once, with the least sum of squared distances."""
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    distances = torch.stack(
        [torch.cdist(own.detach(), theirs).square() for own, theirs in zip(found, wanted, strict=True)]
    ).sum(0)
    _, columns = linear_sum_assignment(distances.double().cpu().numpy())
    return torch.from_numpy(columns).long()
