"""Bad Teaching: on the examples to forget, learn from a teacher who knows nothing.

Chundawat, Tarun, Mandal and Kankanhalli 2023, "Can Bad Teaching Induce Forgetting? Unlearning in Deep
Networks Using an Incompetent Teacher" (AAAI, arXiv 2205.08096). Two teachers: the victim, and the same
architecture with fresh random weights. The student begins as the victim and sees the examples to forget mixed
with a part of the kept ones; on the former it is drawn to the answers of the ignorant teacher, on the latter
to those of the victim: KL(teacher || student), both softened by `temperature`.

As in the authors' code the divergence is a mean over classes too, so it is smaller by their number than
usual. That changes nothing with Adam, the default, and much with SGD: the comparison of Delta-Influence
(arXiv 2411.13731, public code) takes 40 steps of SGD with it, which hardly moves the student.
`unlearners.get("bad-teaching", preset="published")` is that.

Cost: `epochs` passes over `kept_share` of the examples with three forward passes in place of one. Memory:
three copies of the network.

Limits: an ignorant teacher does not say what is right, so the trigger may still have an effect of its own;
and the student never hears the true labels.
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

from unpoison._seeds import derive_seed, generator
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.models import reinitialized
from unpoison.registry import Presets
from unpoison.training import EpochRecord, Recipe, Trained
from unpoison.unlearners._methods import register
from unpoison.unlearners._student import Student
from unpoison.unlearners._unlearner import (
    Unlearner,
    forgotten,
    healed_of,
    network_of,
    recipe_for,
    retained,
)


@final
@register(
    name="bad-teaching",
    title="Bad Teaching",
    summary="Follows an ignorant teacher on the examples to forget, and the victim on the rest.",
    paper="Chundawat et al. 2023, arXiv 2205.08096",
    cost="one pass over a third of the examples with three forward passes",
    presets=("default", "published"),
    reads_forget_set=True,
)
@dataclass(frozen=True, kw_only=True)
class BadTeaching(Unlearner):
    """Bad Teaching, also called Bad Teacher and blindspot unlearning.

    Arguments:
        epochs: passes, 1 or more.
        kept_share: the part of the kept examples that is seen, in (0, 1]; at least one example.
        optimizer: "adam", or "sgd" with momentum 0.9 and weight decay 5e-4.
        learning_rate: above 0.
        batch_size: examples a step, 2 or more.
        temperature: softens both distributions, above 0.
        steps: stop after so many steps in all; None is no such limit.
        lose_classes: allow that a class is left without examples.

    Raises:
        InputError: a value is out of its range.
    """

    PRESETS: ClassVar[Presets] = {
        "default": {},
        "published": {
            "epochs": 40,
            "kept_share": 1.0,
            "optimizer": "sgd",
            "learning_rate": 0.025,
            "batch_size": 512,
            "steps": 40,
        },
    }

    epochs: int = 1
    kept_share: float = 0.3
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: float = 1e-4
    batch_size: int = 256
    temperature: float = 1.0
    steps: int | None = None
    lose_classes: bool = False

    def __post_init__(self) -> None:
        for name, low in {"epochs": 1, "batch_size": 2, "steps": 1}.items():
            value = getattr(self, name)
            if name == "steps" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise InputError(
                    f"bad-teaching: {name} must be a whole number of {low} or more, found {value!r}"
                )
        if not 0 < self.kept_share <= 1:
            raise InputError(f"bad-teaching: kept_share {self.kept_share} is outside (0, 1]")
        if self.optimizer not in ("adam", "sgd"):
            raise InputError(f"bad-teaching: optimizer must be 'adam' or 'sgd', found {self.optimizer!r}")
        for name in ("learning_rate", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"bad-teaching: {name} {getattr(self, name)} is not above 0")

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
        """The student; its history is of the examples seen, those to forget among them.

        Raises:
            InputError: as `Unlearner.heal`, or the network has a module that cannot be reset.
            TrainingDivergedError: a loss is no longer finite.
        """
        started = time.perf_counter()
        rest = retained(training_set, forget, lose_classes=self.lose_classes, method="bad-teaching")
        target = training_set.device if device is None else torch.device(device)
        how, victim = recipe_for(model, recipe), network_of(model)
        ignorant = reinitialized(victim, seed=derive_seed(seed, "bad-teaching", "teacher"))
        competent, bad = (
            Student(network, how, self._optimizer, device=target, seed=seed, method="bad-teaching").network
            for network in (victim, ignorant)
        )
        student = Student(victim, how, self._optimizer, device=target, seed=seed, method="bad-teaching")
        for teacher in (competent, bad):
            teacher.eval().requires_grad_(False)

        draw = torch.randperm(len(rest), generator=generator(seed, "bad-teaching", "kept"))
        some = rest.subset(draw[: max(1, int(self.kept_share * len(rest)))].sort().values)
        poison = forgotten(training_set, forget)
        seen = TrainingSet(
            torch.cat([poison.images, some.images]),
            torch.cat([poison.labels, some.labels]),
            rest.class_names,
            rest.name,
        ).to(target)

        def loss(images: Tensor, logits: Tensor, labels: Tensor, places: Tensor) -> Tensor:
            with torch.no_grad():
                to_forget = (places < len(poison))[:, None]
                told = torch.where(to_forget, bad(images), competent(images))
            return divergence(logits, told, self.temperature)

        history: list[EpochRecord] = []
        left = self.steps
        for epoch in range(self.epochs):
            begun = time.perf_counter()
            lesson = student.epoch(seen, loss, name=f"epoch {epoch}", batch_size=self.batch_size, steps=left)
            record = EpochRecord(
                epoch=epoch,
                loss=lesson.loss,
                accuracy=lesson.accuracy,
                learning_rate=self.learning_rate,
                examples=lesson.examples,
                seconds=time.perf_counter() - begun,
            )
            history.append(record)
            if on_epoch is not None:
                on_epoch(record)
            left = None if left is None else left - lesson.steps
            if left is not None and left <= 0:
                break
        return healed_of(
            model, student.network, rest, recipe=how, seed=seed, history=history, started=started
        )

    def _optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        if self.optimizer == "adam":
            return torch.optim.Adam(parameters, lr=self.learning_rate)
        return torch.optim.SGD(parameters, lr=self.learning_rate, momentum=0.9, weight_decay=5e-4)


def divergence(logits: Tensor, told: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) at `temperature`, a mean over examples and classes; a scalar."""
    return (
        F.kl_div(
            F.log_softmax(logits / temperature, 1),
            F.log_softmax(told / temperature, 1),
            log_target=True,
            reduction="sum",
        )
        / logits.numel()
    )
