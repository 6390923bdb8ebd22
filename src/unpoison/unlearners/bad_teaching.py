"""Bad Teaching: learn from an incompetent teacher on the examples to forget.

Chundawat, Tarun, Mandal and Kankanhalli 2023, "Can Bad Teaching Induce Forgetting? Unlearning in Deep
Networks Using an Incompetent Teacher" (AAAI, arXiv 2205.08096). There are two teachers: the model, and the
same architecture with random weights (drawn anew, or the network before training where `start` is given; a
pretrained one is less incompetent). The student is initialised with the model and trained on the examples
to forget mixed with a part of the kept ones; on the former it minimises the divergence from the incompetent
teacher, on the latter from the model: KL(teacher || student), both at `temperature`.

As in the authors' code the divergence is a mean over classes, too, so it is smaller than usual by their
number. That does not matter with Adam, the default, but it does with SGD: the preset "published" is the
comparison of Delta-Influence (arXiv 2411.13731, public code), 40 steps of SGD, which hardly change the
student.

Cost: `epochs` passes over `kept_share` of the examples with three forward passes in place of one. Memory:
three copies of the network.

Limits: the incompetent teacher does not know the true labels, so the trigger may still have an effect.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from unpoison._inputs import Inputs
from unpoison._option_checks import PositiveFloat, PositiveInt
from unpoison._seeds import derive_seed, generator
from unpoison.errors import InputError
from unpoison.models import logits_of, reinitialized
from unpoison.registry import Presets
from unpoison.training import EpochRecord
from unpoison.unlearners._methods import register
from unpoison.unlearners._student import Student, soft_divergence
from unpoison.unlearners._unlearner import Healed, Request, Unlearner, on_device


@final
@register(
    name="bad-teaching",
    title="Bad Teaching",
    summary="Learns from an incompetent teacher on the examples to forget, and from the model on the rest.",
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
        kept_share: the fraction of the kept examples that is used, in (0, 1]; at least one example.
        optimizer: "adam", or "sgd" with momentum 0.9 and weight decay 5e-4.
        learning_rate: above 0.
        batch_size: examples a step, 2 or more.
        temperature: of both softmax functions, above 0.
        steps: stop after so many steps in all; None is no limit.
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

    any_examples: ClassVar[bool] = True
    uses_start: ClassVar[bool] = True
    epochs: PositiveInt = 1
    kept_share: Annotated[float, "(0, 1]"] = 0.3
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: PositiveFloat = 1e-4
    batch_size: Annotated[int, "[2, inf)"] = 256
    temperature: PositiveFloat = 1.0
    steps: PositiveInt | None = None
    lose_classes: bool = False

    def _heal(self, request: Request) -> Healed:
        seed = request.seed
        incompetent = _incompetent(request).to(request.device).eval().requires_grad_(False)
        competent = request.copied().requires_grad_(False)
        student = Student(request, self._optimizer, steps=self.steps)
        draw = torch.randperm(len(request.rest), generator=generator(seed, "bad-teaching", "kept"))
        some = request.kept[draw[: max(1, int(self.kept_share * len(draw)))].sort().values]
        count = len(request.forgotten)
        both = request.examples.subset(torch.cat([request.forgotten, some]))
        seen = on_device(both, request.device)

        def loss(inputs: Inputs, logits: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
            with torch.no_grad():
                to_forget = (indices < count)[:, None]
                target = torch.where(to_forget, logits_of(incompetent, inputs), logits_of(competent, inputs))
            return soft_divergence(logits, target, self.temperature).mean() / logits.shape[1]

        history: list[EpochRecord] = []
        for epoch in range(self.epochs):
            if student.steps_left == 0:
                break
            history.append(student.epoch(seen, loss, number=epoch, batch_size=self.batch_size))
            history[-1].tell(request.progress, self.epochs)
        return request.healed(student.network, history)

    def _optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        if self.optimizer == "adam":
            return torch.optim.Adam(parameters, lr=self.learning_rate)
        return torch.optim.SGD(parameters, lr=self.learning_rate, momentum=0.9, weight_decay=5e-4)


def _incompetent(request: Request) -> nn.Module:
    """The architecture with random weights: the network before training, or the model drawn anew."""
    if request.start is not None:
        return copy.deepcopy(request.start)
    seed = derive_seed(request.seed, "bad-teaching", "teacher")
    try:
        return reinitialized(request.network, seed=seed)
    except InputError as error:
        raise InputError(
            f"bad-teaching: the architecture cannot be drawn anew ({error}); give start=, a freshly built "
            "network, or use relabel, fine-tune, scrub, ssd or potion, which need none"
        ) from None
