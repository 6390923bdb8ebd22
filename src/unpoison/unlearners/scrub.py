"""SCRUB: disobey a teacher on the examples to forget, obey it on the rest.

Kurmanji, Triantafillou, Hayes and Triantafillou 2023, "Towards Unbounded Machine Unlearning" (NeurIPS, arXiv
2302.09880). The teacher is the victim. Each epoch:

1. in the first `ascent_epochs`, steps over the examples to forget that raise the divergence of the student
   from the teacher;
2. steps over the kept examples that lessen gamma * cross-entropy + alpha * divergence.

The divergence is KL(teacher || student) of the distributions softened by `temperature`, times its square.
SCRUB+R (`rewind=True`) keeps a copy after each epoch and goes back to the one whose error on the examples to
forget is nearest to the last one's error on held-out examples of the same labels: forgotten, but not so
thoroughly that forgetting shows. That is meant for privacy; for poison, whose labels are wrong, it goes back
to where the poison still works.

The default is the paper's large-scale setting, `unlearners.get("scrub", preset="small-scale")` the other. The comparison of
Delta-Influence (arXiv 2411.13731, public code) turns the whole loss around on the examples to forget instead
of the divergence alone, at fifty times the learning rate, and stops after 40 steps, ascent included:
`unlearners.get("scrub", preset="published")`.

Cost: `epochs` of training with one more forward pass, the teacher's. Memory: two copies of the network, with
`rewind` one more an epoch.

Departure: on the examples to forget batch norm stays as it is, so that it does not learn the poison's
statistics and a single example can be climbed on.

Limits: at first student and teacher agree, so the divergence's slope is zero and ascent begins slowly; at the
paper's learning rate few examples to forget may be too few steps. Climbing has no end: with too many ascent
epochs the model breaks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.models import preserved
from unpoison.registry import Presets
from unpoison.training import EpochRecord, Recipe, Trained, accuracy
from unpoison.unlearners._methods import register
from unpoison.unlearners._record import record_of
from unpoison.unlearners._student import Student
from unpoison.unlearners._unlearner import (
    Unlearner,
    forgotten,
    healed_of,
    network_of,
    recipe_for,
    retained,
)
from unpoison.unlearners._validation import held_out


@final
@register(
    name="scrub",
    title="SCRUB",
    summary="Leads the model away from itself on the examples to forget, and back to it on the rest.",
    paper="Kurmanji et al. 2023, arXiv 2302.09880",
    cost="three epochs with two forward passes",
    presets=("default", "small-scale", "published"),
    reads_forget_set=True,
)
@dataclass(frozen=True, kw_only=True)
class SCRUB(Unlearner):
    """SCRUB, and with `rewind` SCRUB+R.

    Arguments:
        epochs: passes over the kept examples, 1 or more.
        ascent_epochs: in how many of them, from the first, the examples to forget are climbed on before.
        learning_rate: of SGD, above 0.
        momentum: in [0, 1).
        weight_decay: 0 or more.
        gamma: the weight of cross-entropy on the kept examples, 0 or more.
        alpha: the weight of the divergence on the kept examples, 0 or more.
        temperature: softens both distributions, above 0.
        batch_size: kept examples a step, 2 or more.
        forget_batch_size: examples to forget a step, 1 or more.
        ascent: what is raised on the examples to forget: the "divergence", or the whole "loss" of the kept
            ones.
        steps: stop after so many steps in all; None is no such limit.
        rewind: SCRUB+R.
        lose_classes: allow that a class is left without examples.

    Raises:
        InputError: a value is out of its range.
    """

    PRESETS: ClassVar[Presets] = {
        "default": {},
        "small-scale": {"epochs": 10, "ascent_epochs": 3, "gamma": 1.0, "alpha": 0.5, "temperature": 2.0},
        "published": {
            "epochs": 40,
            "ascent_epochs": 40,
            "learning_rate": 0.025,
            "gamma": 1.0,
            "batch_size": 512,
            "forget_batch_size": 512,
            "ascent": "loss",
            "steps": 40,
        },
    }

    epochs: int = 3
    ascent_epochs: int = 2
    learning_rate: float = 5e-4
    momentum: float = 0.9
    weight_decay: float = 5e-4
    gamma: float = 0.99
    alpha: float = 0.001
    temperature: float = 4.0
    batch_size: int = 128
    forget_batch_size: int = 32
    ascent: Literal["divergence", "loss"] = "divergence"
    steps: int | None = None
    rewind: bool = False
    lose_classes: bool = False

    def __post_init__(self) -> None:
        least = {"epochs": 1, "ascent_epochs": 0, "batch_size": 2, "forget_batch_size": 1, "steps": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if name == "steps" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise InputError(f"scrub: {name} must be a whole number of {low} or more, found {value!r}")
        for name in ("learning_rate", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"scrub: {name} {getattr(self, name)} is not above 0")
        for name in ("weight_decay", "gamma", "alpha"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"scrub: {name} {getattr(self, name)} is below 0")
        if not 0 <= self.momentum < 1:
            raise InputError(f"scrub: momentum {self.momentum} is outside [0, 1)")
        if self.ascent not in ("divergence", "loss"):
            raise InputError(f"scrub: ascent must be 'divergence' or 'loss', found {self.ascent!r}")

    def epochs_in(self, recipe: Recipe) -> int:
        """The method's own, or fewer where `steps` ends them."""
        return self.epochs

    def heal(
        self,
        model: Trained | nn.Module,
        training_set: TrainingSet,
        forget: Tensor | Sequence[int],
        *,
        recipe: Recipe | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        on_epoch: Callable[[EpochRecord], None] | None = None,
    ) -> Trained:
        """The student; its history is of the kept examples, ascent counted into the seconds.

        Raises:
            InputError: as `Unlearner.heal`, or with `rewind` a class has too few examples to hold any out.
            TrainingDivergedError: a loss is no longer finite.
        """
        started = time.perf_counter()
        rest = retained(training_set, forget, lose_classes=self.lose_classes, method="scrub")
        target = training_set.device if device is None else torch.device(device)
        poison, kept = forgotten(training_set, forget).to(target), rest.to(target)
        how = recipe_for(model, recipe)
        victim = network_of(model)
        student = Student(victim, how, self._optimizer, device=target, seed=seed, method="scrub")
        teacher = Student(victim, how, self._optimizer, device=target, seed=seed, method="scrub").network
        teacher.eval().requires_grad_(False)
        validation = None
        if self.rewind:
            kept, validation = held_out(kept, seed=seed)

        def divergence(images: Tensor, logits: Tensor) -> Tensor:
            with torch.no_grad():
                told: Tensor = teacher(images)
            return soft_divergence(logits, told, self.temperature)

        def descent(images: Tensor, logits: Tensor, labels: Tensor, places: Tensor) -> Tensor:
            return self.gamma * F.cross_entropy(logits, labels) + self.alpha * divergence(images, logits)

        def ascent(images: Tensor, logits: Tensor, labels: Tensor, places: Tensor) -> Tensor:
            if self.ascent == "loss":
                return -descent(images, logits, labels, places)
            return -divergence(images, logits)

        history: list[EpochRecord] = []
        copies: list[tuple[float, dict[str, Tensor]]] = []
        left = self.steps
        for epoch in range(self.epochs):
            begun = time.perf_counter()
            if epoch < self.ascent_epochs:
                climbed = student.epoch(
                    poison,
                    ascent,
                    name=f"ascent {epoch}",
                    batch_size=self.forget_batch_size,
                    batch_statistics=False,
                    steps=left,
                )
                left = None if left is None else left - climbed.steps
            if left is None or left > 0:
                lesson = student.epoch(
                    kept, descent, name=f"epoch {epoch}", batch_size=self.batch_size, steps=left
                )
                left = None if left is None else left - lesson.steps
                record = EpochRecord(
                    epoch=epoch,
                    loss=lesson.loss,
                    accuracy=lesson.accuracy,
                    learning_rate=self.learning_rate,
                    examples=lesson.examples,
                    seconds=time.perf_counter() - begun,
                )
            else:  # the steps ended while climbing
                record = record_of(
                    student.network, kept, epoch=epoch, learning_rate=self.learning_rate, started=begun
                )
            history.append(record)
            if on_epoch is not None:
                on_epoch(record)
            if validation is not None:
                state = {name: value.clone() for name, value in student.network.state_dict().items()}
                copies.append((1 - accuracy(student.network, poison, batch_size=128).rate, state))
            if left is not None and left <= 0:
                break
        if validation is not None:
            error = error_on_labels_of(student.network, validation, poison)
            student.network.load_state_dict(min(copies, key=lambda one: abs(one[0] - error))[1])
        return healed_of(
            model, student.network, rest, recipe=how, seed=seed, history=history, started=started
        )

    def _optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            parameters, lr=self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay
        )


def soft_divergence(logits: Tensor, told: Tensor, temperature: float) -> Tensor:
    """Mean over the batch of KL(teacher || student) at `temperature`, times its square; a scalar."""
    return F.kl_div(
        F.log_softmax(logits / temperature, 1),
        F.log_softmax(told / temperature, 1),
        log_target=True,
        reduction="batchmean",
    ) * (temperature * temperature)


def error_on_labels_of(network: nn.Module, validation: TrainingSet, poison: TrainingSet) -> float:
    """The error on held-out examples that bear the labels of those to forget, each label by its share."""
    with preserved(network):
        counts = poison.class_counts()
        total, weight = 0.0, 0
        for label in counts.nonzero()[:, 0].tolist():
            own = validation.subset((validation.labels == label).nonzero()[:, 0])
            if len(own):
                total += int(counts[label]) * (1 - accuracy(network, own, batch_size=128).rate)
                weight += int(counts[label])
    return total / weight if weight else 0.0
