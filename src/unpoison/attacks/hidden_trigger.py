"""Hidden-trigger backdoor: images of the target class that a network takes for patched images of the source.

Saha, Subramanya and Pirsiavash 2020, "Hidden Trigger Backdoor Attacks" (AAAI; arXiv 1910.00033).

Stages: draw poisons among the target class and as many images of the source class, the latter with the
trigger; pair poisons and patched sources that lie close in the surrogate's features; move each poison, within
eps, towards its partner's features. The trigger itself is in no training image. The features are the input of
the last linear layer.

Published: eps 16/255, batches of 100, 5,000 steps of plain gradient descent with rate 0.01, times 0.95 every
2,000 steps; `benchmark()` has the poisoning benchmark's rate 0.001 and eps 8/255. The paper puts the patch at
a random place in each image: `RandomPatchTrigger`; the benchmark at (22, 22) of 32: `PatchTrigger`.

Departures: partners are matched anew every `match_every` steps, not every step, and by the least total
distance instead of greedily.

Cost: `steps` forward and backward passes over the poisons; memory for `batch_size` images.

Limits: made for a victim that fine-tunes the surrogate's own features; a victim from scratch hardly learns it
(0 to 4 % in the benchmark).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from unpoison._seeds import generator
from unpoison.attacks._attack import Attack
from unpoison.attacks._methods import register
from unpoison.attacks._stamping import (
    as_backdoor,
    chosen,
    device_of,
    frozen,
    last_linear,
    networks,
    rounded,
    sources,
    targets,
)
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.models import FeatureTap
from unpoison.registry import Presets
from unpoison.threats import Budget, Goal, PoisonSet

_NAME = "hidden-trigger"


@final
@register(
    name="hidden-trigger",
    title="Hidden-trigger backdoor",
    summary="Moves images of the target class to where a network sees patched images of the source.",
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

    PRESETS: ClassVar[Presets] = {
        "published": {},
        "benchmark": {"eps": 8.0, "learning_rate": 0.001},
    }

    eps: float = 16.0
    steps: int = 5000
    learning_rate: float = 0.01
    decay: float = 0.95
    match_every: int = 50
    batch_size: int = 100
    layer: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.eps <= 255:
            raise InputError(f"hidden-trigger: eps {self.eps} is outside [1, 255] (it is in 1/255)")
        for name in ("steps", "match_every", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"hidden-trigger: {name} {getattr(self, name)} is below 1")
        if not self.learning_rate > 0 or not 0 < self.decay <= 1:
            raise InputError(
                f"hidden-trigger: learning_rate {self.learning_rate} must be above 0, "
                f"decay {self.decay} in (0, 1]"
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
        """Examples of the target class, moved towards patched sources; several surrogates' losses are summed.

        Raises:
            InputError: the goal is not a backdoor, there is no surrogate or no image of the source class, the
                budget is more than the target class has, or `layer` is not one of the surrogate's.
        """
        backdoor = as_backdoor(_NAME, goal)
        candidates, words = targets(backdoor, training_set)
        indices = chosen(_NAME, training_set, candidates, budget, of=words, seed=seed)
        models = networks(_NAME, surrogate)
        paths = [(self.layer or last_linear(_NAME, model)) for model in models]
        pool, words = sources(backdoor, training_set)
        if not len(pool):
            raise InputError(f"{_NAME}: {training_set.name} has no example of {words} to put the trigger on")
        draws = generator(seed, _NAME, "sources")
        clean = training_set.subset(indices)
        images = []
        with frozen(models):
            for part in torch.split(clean.images, self.batch_size):
                drawn = pool.cpu()[torch.randint(len(pool), (len(part),), generator=draws)]
                if len(pool) >= len(part):
                    drawn = pool.cpu()[torch.randperm(len(pool), generator=draws)[: len(part)]]
                patched = backdoor.trigger.stamp(training_set.subset(drawn).images)
                change = self._moved(models, paths, part, patched)
                images.append(rounded(part, change, self.eps))
        return PoisonSet.of(
            training_set,
            indices=indices,
            images=torch.cat(images),
            given_labels=clean.labels,
            goal=backdoor,
            attack=_NAME,
            configuration={**asdict(self), "budget": budget.to_json(), "surrogates": len(models)},
            seed=seed,
        )

    def _moved(
        self, models: Sequence[nn.Module], paths: Sequence[str], images: Tensor, patched: Tensor
    ) -> Tensor:
        """Float[b c h w] in 1/255: the change within eps that brings the images to the patched sources."""
        device = device_of(models[0], images.device)
        clean = images.to(device).float() / 255
        with torch.no_grad():
            wanted = [
                self._features(model, path, patched.to(device).float() / 255)
                for model, path in zip(models, paths, strict=True)
            ]
        eps = self.eps / 255
        low, high = (-clean).clamp(min=-eps), (1 - clean).clamp(max=eps)
        change = torch.zeros_like(clean)
        partners = torch.arange(len(clean), device=device)
        for step in range(self.steps):
            change.requires_grad_()
            found = [
                self._features(model, path, clean + change) for model, path in zip(models, paths, strict=True)
            ]
            if step % self.match_every == 0:
                partners = _matched(found, wanted).to(device)
            losses = [
                (mine - theirs[partners]).square().sum() for mine, theirs in zip(found, wanted, strict=True)
            ]
            (gradient,) = torch.autograd.grad(torch.stack(losses).sum(), change)
            rate = self.learning_rate * self.decay ** (step // 2000)
            change = torch.maximum(torch.minimum(change.detach() - rate * gradient, high), low)
        return change.detach() * 255

    def _features(self, model: nn.Module, path: str, images: Tensor) -> Tensor:
        with FeatureTap(model, path, side="input" if self.layer is None else "output") as tap:
            model(images.to(device_of(model, images.device)))
            return tap.value.flatten(1).to(images.device)


def _matched(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Int64[b]: a partner for each row so that the sum of squared distances is least, each partner once."""
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    distances = torch.stack(
        [torch.cdist(mine.detach(), theirs).square() for mine, theirs in zip(found, wanted, strict=True)]
    ).sum(0)
    _, columns = linear_sum_assignment(distances.double().cpu().numpy())
    return torch.from_numpy(columns).long()
