"""Error-minimising noise: makes training examples look learned, so that nothing is learned of them.

Huang, Ma, Erfani, Bailey and Wang 2021, "Unlearnable Examples: Making Personal Data Unexploitable" (ICLR;
arXiv 2101.04898).

Stages: in rounds, train a network of random parameters for a few steps on the poisoned set of the moment;
then move the noise of every example within eps so that the network's loss on it falls (projected gradient
descent by signs); stop once the network makes few errors on the poisons. A victim finds the noise, which
tells the class, before it finds the content of the images, so it is wrong on images without noise.

Published (CIFAR-10, all examples poisoned): eps 8/255, 10 training steps in a round, 20 steps of eps/10, stop
at an error of 1 %: the preset "published", which poisons each example with noise of its own. The preset
"class-wise" has one noise for each class, one step in a round and stops at 10 %. "sample" is ours, with fewer
steps.

Departures: the network is that of the surrogate with new parameters, of which only the architecture is used.
At most `rounds` rounds are made.

Cost: in each round `training_steps` training steps and `steps` forward and backward passes over the poisons.

Limits: where part of the set is clean, victims learn from that part as if the rest were not there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor

from unpoison import _stable
from unpoison._option_checks import Fraction, PositiveFloat, PositiveInt
from unpoison.attacks._attack import Attack, CraftRequest
from unpoison.attacks._inner_network import InnerNetwork, batches
from unpoison.attacks._methods import register
from unpoison.data import TrainingSet
from unpoison.models import logits_of
from unpoison.registry import Presets
from unpoison.threats import LInf, PoisonSet


@final
@register(
    name="error-minimizing",
    title="Error-minimising noise",
    summary="Adds noise that makes examples look learned, so that nothing is learned of them; labels stay.",
    paper="Huang, Ma, Erfani, Bailey and Wang 2021, ICLR, arXiv 2101.04898",
    cost="some rounds of 20 forward and backward passes over the poisons",
    presets=("published", "class-wise", "sample"),
    labels="clean",
    goals=("availability",),
    knowledge="the whole training set and an architecture like the victim's",
    surrogates=1,
    accepts_surrogates=True,
)
@dataclass(frozen=True, kw_only=True)
class ErrorMinimizing(Attack):
    """Availability poison by error-minimising noise.

    Arguments:
        eps: the greatest change in 1/255, in [1, 255].
        class_wise: one noise for all examples of a class.
        rounds: of training and of moving the noise, at most; 1 or more.
        training_steps: of the network in a round, 1 or more.
        steps: of the noise in a round, 1 or more.
        step_size: of the noise in 1/255, above 0.
        stop_error: stop once the network's error on the poisons is below, in [0, 1].
        learning_rate: of the network, above 0.
        batch_size: images in a step, 2 or more.
    """

    PRESETS: ClassVar[Presets] = {
        "published": {},
        "class-wise": {"class_wise": True, "steps": 1, "stop_error": 0.1},
        "sample": {"steps": 5, "step_size": 2.0, "rounds": 12, "learning_rate": 0.05, "batch_size": 64},
    }

    eps: Annotated[float, "[1, 255]"] = 8.0
    class_wise: bool = False
    rounds: PositiveInt = 50
    training_steps: PositiveInt = 10
    steps: PositiveInt = 20
    step_size: PositiveFloat = 0.8
    stop_error: Fraction = 0.01
    learning_rate: PositiveFloat = 0.1
    batch_size: Annotated[int, "[2, inf)"] = 128

    def poison(self, request: CraftRequest) -> PoisonSet:
        """Examples of all classes with noise; of several surrogates the architecture of the first is used.

        Raises:
            InputError: there is no surrogate, or its parameters cannot be reset.
        """
        inner = InnerNetwork(request, learning_rate=self.learning_rate)
        training_set = request.training_set.to(inner.device)
        indices = request.draw(torch.arange(len(training_set)), training_set.name)
        noise = _Noise(training_set, indices, self, request.generator("start"))
        order = batches(len(training_set), self.batch_size, request.generator("batches"))
        errors: list[float] = []
        while len(errors) < self.rounds and (not errors or errors[-1] >= self.stop_error):
            for _ in range(self.training_steps):
                rows = next(order)
                if len(rows) > 1:  # batch norm needs two
                    images, labels = noise.poisoned(rows)
                    with inner.training() as network:
                        inner.step(F.cross_entropy(logits_of(network, images), labels))
            with inner.frozen() as network:
                wrong = 0
                for part in torch.split(torch.arange(len(indices)), self.batch_size):
                    wrong += noise.descend(network, part)
            errors.append(wrong / len(indices))
            request.report(len(errors), self.rounds, achieved=errors[-1])
        labels = request.training_set.labels[indices.to(request.training_set.device)]
        return request.poison_set(indices=indices, images=noise.rounded(), labels=labels, errors=errors)


@final
class _Noise:
    """The noise of the poisons, each in its slot: one for each poison, or one for each class."""

    def __init__(
        self, training_set: TrainingSet, indices: Tensor, attack: ErrorMinimizing, draws: torch.Generator
    ) -> None:
        self._set, self._attack, device = training_set, attack, training_set.device
        self._indices = indices.to(device)
        count = len(indices)
        own = training_set.labels[self._indices] if attack.class_wise else torch.arange(count, device=device)
        self._slots = own
        slots = training_set.num_classes if attack.class_wise else count
        start = torch.rand((slots, *training_set.image_shape), generator=draws) * 2 - 1
        self._noise = (start * attack.eps).to(device)
        self._places = torch.full((len(training_set),), -1, device=device)
        self._places[self._indices] = torch.arange(count, device=device)

    def poisoned(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Float[b c h w] in [0, 1] and Int64[b]: these examples of the set, with the noise of the poisons."""
        rows = rows.to(self._set.device)
        images, places = self._set.images[rows].float(), self._places[rows]
        noise = self._noise[self._slots[places.clamp(min=0)]] * (places >= 0).view(-1, 1, 1, 1)
        return (images + noise).clamp(0, 255) / 255, self._set.labels[rows]

    def descend(self, network: torch.nn.Module, part: Tensor) -> int:
        """Move the noise of some poisons; how many of them the network still predicts wrongly after it."""
        part = part.to(self._set.device)
        rows = self._indices[part]
        clean, labels = self._set.images[rows].float(), self._set.labels[rows]
        used, of_each = torch.unique(self._slots[part], return_inverse=True)
        noise, attack = self._noise[used], self._attack
        for _ in range(attack.steps):
            noise.requires_grad_()
            logits = logits_of(network, (clean + noise[of_each]).clamp(0, 255) / 255)
            loss = _stable.cross_entropy(logits, labels, reduction="sum")
            (slope,) = torch.autograd.grad(loss, noise)
            noise = (noise.detach() - attack.step_size * slope.sign()).clamp(-attack.eps, attack.eps)
        self._noise[used] = noise
        with torch.no_grad():
            predicted = logits_of(network, (clean + noise[of_each]).clamp(0, 255) / 255).argmax(1)
        return int((predicted != labels).sum())

    def rounded(self) -> Tensor:
        """UInt8[k c h w]: the poisons within eps."""
        bound, parts = LInf(self._attack.eps), []
        for part in torch.split(torch.arange(len(self._indices), device=self._set.device), 1024):
            clean = self._set.images[self._indices[part]]
            parts.append(bound.rounded(clean, {"delta": self._noise[self._slots[part]]}))
        return torch.cat(parts)
