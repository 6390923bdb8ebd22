"""Neural Attention Distillation: where the model looks is taught by a copy that was fine-tuned on clean data.

Li, Lyu, Koren, Lyu, Li and Ma 2021, "Neural Attention Distillation: Erasing Backdoor Triggers from Deep
Neural Networks" (ICLR, arXiv 2101.05930). Stages:

1. the teacher: a copy of the model, fine-tuned on clean examples;
2. the student: another copy, trained on the same examples with cross-entropy plus `beta` times the distance
   of its attention maps from the teacher's, summed over the stages of the network.

The attention map of a stage is the mean over channels of the squared activations, divided by its norm. A
stage ends at the last module whose output has a spatial size, which in a residual network is a group of
blocks. In a network without maps, hidden vectors stand for them, as maps of one channel.

It needs no findings: the clean examples are the reference that is given, or the examples to keep.

Cost: twice `epochs` passes over the clean examples, the second with one more forward pass. Memory: three
copies of the network.

Departure: the squared distance, a mean over the places of a map, in place of the distance, whose gradient has
no limit where both agree.

Limits: what fine-tuning leaves of the backdoor the teacher has, too. A large `beta` with few examples costs
accuracy.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from unpoison._inputs import Inputs, placed
from unpoison._option_checks import NonNegativeFloat, PositiveFloat, PositiveInt
from unpoison._stable import cross_entropy
from unpoison.models import FeatureTap, logits_of
from unpoison.registry import Presets
from unpoison.training import EpochRecord
from unpoison.unlearners._further import clean_training, made_optimizer, rate_between, train_further
from unpoison.unlearners._methods import register
from unpoison.unlearners._student import Student
from unpoison.unlearners._unlearner import Healed, Request, Unlearner


@final
@register(
    name="nad",
    title="Neural Attention Distillation (NAD)",
    summary="Teaches the model the attention of a copy that was fine-tuned on clean examples.",
    paper="Li et al. 2021, arXiv 2101.05930",
    cost="twenty epochs over the clean examples",
    presets=("default", "published"),
    needs_findings=False,
    uses_reference=True,
)
@dataclass(frozen=True, kw_only=True)
class NAD(Unlearner):
    """Neural Attention Distillation.

    Arguments:
        beta: the weight of the distance of the attention maps, 0 or more.
        epochs: passes over the clean examples, of the teacher and of the student, 1 or more.
        learning_rate: the greatest of the schedule, which falls to zero; None is that of the recipe, or
            without one the one that is found.
        lose_classes: allow that a class is left without examples.

    Raises:
        InputError: a value is out of its range.
    """

    PRESETS: ClassVar[Presets] = {"default": {}, "published": {"learning_rate": 0.1}}

    any_examples: ClassVar[bool] = True
    beta: NonNegativeFloat = 1000.0
    epochs: PositiveInt = 10
    learning_rate: PositiveFloat | None = None
    lose_classes: bool = False

    def _heal(self, request: Request) -> Healed:
        teacher = request.trainable()
        training, told = clean_training(
            request, teacher, epochs=self.epochs, learning_rate=self.learning_rate
        )
        history = train_further(request, teacher, request.clean, training, of=2 * self.epochs)
        teacher.eval().requires_grad_(False)
        student = Student(request, partial(made_optimizer, training))
        few = placed(request.clean.batch(0, 2)[0], request.device)
        paths = stages(teacher, few)

        def loss(inputs: Inputs, logits: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
            own = [attention(tap.value) for tap in taps]
            with torch.no_grad(), contextlib.ExitStack() as stack:
                others = [stack.enter_context(FeatureTap(teacher, path)) for path in paths]
                logits_of(teacher, inputs)
            wanted = [attention(tap.value) for tap in others]
            distances = [(a - b).square().mean() for a, b in zip(own, wanted, strict=True)]
            learned = cross_entropy(logits, labels, label_smoothing=training.label_smoothing)
            return learned + self.beta * sum(distances, torch.zeros_like(learned))

        with contextlib.ExitStack() as stack:
            taps = [stack.enter_context(FeatureTap(student.network, path)) for path in paths]
            for number in range(self.epochs):
                record: EpochRecord = student.epoch(
                    request.clean,
                    loss,
                    number=self.epochs + number,
                    batch_size=training.batch_size,
                    rate=partial(rate_between, training, number, 1),
                )
                record.tell(request.progress, 2 * self.epochs)
                history.append(record)
        return request.healed(student.network, history, tuning=told)


def attention(maps: Tensor) -> Tensor:
    """Float[b places]: the mean square over the channels of Float[b c ...], divided by its norm.

    >>> attention(torch.tensor([[[3.0, 0.0]], [[0.0, 0.0]]]))
    tensor([[1., 0.],
            [0., 0.]])
    """
    maps = maps[:, None] if maps.ndim == 2 else maps
    energy = maps.to(torch.promote_types(maps.dtype, torch.float32)).flatten(2).square().mean(1)
    return torch.nn.functional.normalize(energy, dim=1, eps=1e-12)


def stages(network: nn.Module, inputs: Inputs) -> list[str]:
    """The paths of the modules at which the stages of a network end, in the order of the forward pass.

    Of each spatial size in Float[b c ...] the last module whose output has it; where there is none, of each
    size in Float[b d], but for the output of the network.

    Arguments:
        network: any, in eval mode.
        inputs: two or more examples, on its device.
    """
    seen: list[tuple[str, torch.Size]] = []
    count = len(logits_of(network, inputs))

    def note(path: str, module: nn.Module, _: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim > 1 and len(output) == count:
            seen.append((path, output.shape[1:]))

    with contextlib.ExitStack() as stack, torch.no_grad():
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for path, module in network.named_modules():
            if path:
                stack.callback(module.register_forward_hook(partial(note, path)).remove)
        last = logits_of(network, inputs)
    maps = [(path, shape[1:]) for path, shape in seen if len(shape) > 1 and shape[1:].numel() > 1]
    vectors = [(path, shape) for path, shape in seen if len(shape) == 1 and shape != last.shape[1:]]
    ends: dict[torch.Size, str] = {}
    for path, size in maps or vectors:
        ends.pop(size, None)
        ends[size] = path
    return list(ends.values())
