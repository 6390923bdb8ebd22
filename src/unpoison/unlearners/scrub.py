"""SCRUB: a student that disagrees with a teacher on the examples to forget and agrees with it on the rest.

Kurmanji, Triantafillou, Hayes and Triantafillou 2023, "Towards Unbounded Machine Unlearning" (NeurIPS, arXiv
2302.09880). The teacher is the model itself. Each epoch:

1. in the first `ascent_epochs`, steps over the examples to forget that raise the divergence of the student
   from the teacher;
2. steps over the kept examples that lower gamma * cross-entropy + alpha * divergence.

The divergence is KL(teacher || student) of the softmax at `temperature`, times its square. SCRUB+R
(`rewind=True`) keeps a copy after each epoch and returns the one whose error on the examples to forget is
nearest to the last one's error on held-out examples of the same labels. That is meant for privacy; for
poison, whose labels are wrong, it returns a model in which the poison still works.

The default is the paper's large-scale setting, the preset "small-scale" the other. The preset "published" is
the comparison of Delta-Influence (arXiv 2411.13731, public code): it negates the whole loss on the examples
to forget in place of the divergence, at fifty times the learning rate, and stops after 40 steps, ascent
included.

Cost: `epochs` of training with one more forward pass, the teacher's. Memory: two copies of the network; with
`rewind` one more an epoch.

Departure: on the examples to forget batch norm keeps its statistics, so that it does not learn those of the
poison and a batch may be a single example.

Limits: student and teacher agree at first, so the gradient of the divergence is zero and ascent begins
slowly; at the paper's learning rate few examples to forget may give too few steps. Ascent is unbounded: with
too many ascent epochs the model breaks.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from unpoison._inputs import Inputs
from unpoison._option_checks import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from unpoison._stable import cross_entropy
from unpoison.data import Examples
from unpoison.models import logits_of
from unpoison.registry import Presets
from unpoison.training import EpochRecord, accuracy
from unpoison.unlearners._methods import register
from unpoison.unlearners._student import Student, soft_divergence
from unpoison.unlearners._unlearner import BATCH_SIZE, Healed, Request, Unlearner, record_of
from unpoison.unlearners._validation import held_out


@final
@register(
    name="scrub",
    title="SCRUB",
    summary="Raises the divergence from the model on the examples to forget, and lowers it on the rest.",
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
        ascent_epochs: how many of them, from the first, begin with ascent on the examples to forget.
        learning_rate: of SGD, above 0.
        momentum: in [0, 1).
        weight_decay: 0 or more.
        gamma: the weight of cross-entropy on the kept examples, 0 or more.
        alpha: the weight of the divergence on the kept examples, 0 or more.
        temperature: of both softmax functions, above 0.
        batch_size: kept examples a step, 2 or more.
        forget_batch_size: examples to forget a step, 1 or more.
        ascent: what is raised on the examples to forget: the "divergence", or the whole "loss" of the kept
            ones.
        steps: stop after so many steps in all; None is no limit.
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

    any_examples: ClassVar[bool] = True
    epochs: PositiveInt = 3
    ascent_epochs: NonNegativeInt = 2
    learning_rate: PositiveFloat = 5e-4
    momentum: Annotated[float, "[0, 1)"] = 0.9
    weight_decay: NonNegativeFloat = 5e-4
    gamma: NonNegativeFloat = 0.99
    alpha: NonNegativeFloat = 0.001
    temperature: PositiveFloat = 4.0
    batch_size: Annotated[int, "[2, inf)"] = 128
    forget_batch_size: PositiveInt = 32
    ascent: Literal["divergence", "loss"] = "divergence"
    steps: PositiveInt | None = None
    rewind: bool = False
    lose_classes: bool = False

    def _heal(self, request: Request) -> Healed:
        poison, kept = request.forget, request.rest
        student = Student(request, self._optimizer, steps=self.steps)
        teacher = request.copied().requires_grad_(False)
        validation = None
        if self.rewind:
            kept, validation = held_out(kept, seed=request.seed)

        def divergence(inputs: Inputs, logits: Tensor) -> Tensor:
            with torch.no_grad():
                target = logits_of(teacher, inputs)
            return soft_divergence(logits, target, self.temperature).mean() * self.temperature**2

        def descent(inputs: Inputs, logits: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
            return self.gamma * cross_entropy(logits, labels) + self.alpha * divergence(inputs, logits)

        def ascent(inputs: Inputs, logits: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
            if self.ascent == "loss":
                return -descent(inputs, logits, labels, indices)
            return -divergence(inputs, logits)

        history: list[EpochRecord] = []
        copies: list[tuple[float, dict[str, Tensor]]] = []
        for epoch in range(self.epochs):
            if student.steps_left == 0:
                break
            begun = time.perf_counter()
            if epoch < self.ascent_epochs:
                student.epoch(
                    poison,
                    ascent,
                    number=epoch,
                    batch_size=self.forget_batch_size,
                    part="ascent",
                    batch_statistics=False,
                )
            if student.steps_left == 0:  # the steps ended during the ascent
                record = record_of(
                    student.network, kept, epoch=epoch, learning_rate=self.learning_rate, started=begun
                )
            else:
                record = student.epoch(kept, descent, number=epoch, batch_size=self.batch_size, started=begun)
            history.append(record)
            record.tell(request.progress, self.epochs)
            if validation is not None:
                state = {name: value.clone() for name, value in student.network.state_dict().items()}
                copies.append((_error(student.network, poison), state))
        if validation is not None:
            error = error_on_labels_of(student.network, validation, poison)
            student.network.load_state_dict(min(copies, key=lambda one: abs(one[0] - error))[1])
        return request.healed(student.network, history)

    def _optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            parameters, lr=self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay
        )


def error_on_labels_of(network: nn.Module, validation: Examples, poison: Examples) -> float:
    """The error on held-out examples of the labels of those to forget, weighted by their counts."""
    counts = torch.bincount(poison.labels.cpu(), minlength=poison.num_classes)
    total, weight = 0.0, 0
    for label in counts.nonzero()[:, 0].tolist():
        own = validation.subset((validation.labels.cpu() == label).nonzero()[:, 0])
        if len(own):
            total += int(counts[label]) * _error(network, own)
            weight += int(counts[label])
    return total / weight if weight else 0.0


def _error(network: nn.Module, examples: Examples) -> float:
    return 1 - accuracy(network, examples, batch_size=BATCH_SIZE).rate
