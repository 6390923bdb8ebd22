"""SCALE-UP: the answer to an input with a trigger survives when all pixels are multiplied.

Guo, Li, Chen, Guo, Sun and Liu, "SCALE-UP: An Efficient Black-box Input-level Backdoor Detection via
Analyzing Scaled Prediction Consistency" (ICLR 2023, arXiv 2302.03251). The scaled prediction consistency
(SPC) of an input x with the answer y is the share of the factors n in {3, 5, 7, 9, 11} for which
clip(n x, 0, 1) is answered y too.

Presets: `data-free` scores by the SPC itself; `data-limited` subtracts the mean and divides by the deviation
of the SPC of clean examples that the model gives the same answer (100 a class, as the paper has; those of all
classes where an answer has fewer than two).

Departures: in both the threshold is the rank among clean inputs, not one that is set by hand. The SPC has six
values, so that ties are frequent and fewer clean inputs than stated are flagged.

Limits: it needs labels alone, so a model behind an interface can be screened. Dark triggers, such as a black
patch, do not grow with the factor; bright images are white after it.

Cost: 6 forward passes an input. Memory: a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from unpoison._inputs import Inputs, placed
from unpoison._option_checks import PositiveFloat, PositiveInt
from unpoison.errors import InputError
from unpoison.input_detectors._input_detector import InputDetector, Request, Scorer
from unpoison.input_detectors._methods import register
from unpoison.registry import Presets

# What is added to a deviation, which is 0 where all clean examples of a class agree: half of what one factor
# of five changes.
_LEAST = 0.1


@final
@register(
    name="scale-up",
    title="SCALE-UP",
    summary="Flags inputs whose answer stays the same when all pixels are multiplied.",
    paper="Guo et al. 2023, arXiv 2302.03251",
    cost="6 forward passes an input",
    changes_pixels=True,
    presets=("data-free", "data-limited"),
)
@dataclass(frozen=True, kw_only=True)
class ScaleUp(InputDetector):
    """Flag inputs that are answered alike when their pixels are multiplied.

    Arguments:
        factors: what pixels are multiplied by.
        per_class: of how many clean examples a class the consistency is compared with; 0 for none.
        batch_size: inputs of a forward pass.
    """

    PRESETS: ClassVar[Presets] = {"data-free": {}, "data-limited": {"per_class": 100}}

    factors: tuple[PositiveFloat, ...] = (3.0, 5.0, 7.0, 9.0, 11.0)
    per_class: int = 0
    batch_size: PositiveInt = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.factors or min(self.factors) <= 0:
            raise InputError(f"scale-up: factors must be positive numbers, found {self.factors}")
        if self.per_class < 0:
            raise InputError(f"scale-up: per_class must be at least 0, found {self.per_class}")

    @property
    def learns(self) -> int:
        """See `InputDetector.learns`; half of what there is, of which each class has its share."""
        return 1 << 40 if self.per_class else 0

    @property
    def keeps(self) -> int:
        """None: of the clean examples only the consistency is kept."""
        return 0

    def prepare(self, request: Request) -> Scorer:
        """See the module's docstring."""

        def consistency(inputs: Inputs, predicted: Tensor) -> Tensor:
            images = request.pixels(inputs, self.method.name)
            same = [request.logits((n * images).clamp(0, 1)).argmax(1) == predicted for n in self.factors]
            return torch.stack(same).double().mean(0)

        if not self.per_class:
            return consistency
        known, answers = [], []
        for inputs, *_ in request.reference.in_batches(self.batch_size):
            there = placed(inputs, request.device)
            predicted = request.logits(there).argmax(1)
            known.append(consistency(there, predicted))
            answers.append(predicted)
        means, deviations = by_answer(torch.cat(known), torch.cat(answers), self.per_class)

        def score(inputs: Inputs, predicted: Tensor) -> Tensor:
            of = predicted.clamp(max=len(means) - 1)
            return (consistency(inputs, predicted) - means[of]) / deviations[of]

        return score


def by_answer(values: Tensor, answers: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Float64[a + 2] each: mean and deviation (and .1) of the first `most` values of each answer up to the
    largest, a; of all values where there are fewer than two, as for the last entry, of answers beyond.

    >>> by_answer(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0, 0, 1]), 9)[0]
    tensor([0.5000, 0.6667, 0.6667], dtype=torch.float64)
    """
    values = values.double()
    means, deviations = [], []
    for answer in range(int(answers.max()) + 2):
        own = values[answers == answer][:most]
        own = own if len(own) > 1 else values
        means.append(own.mean())
        deviations.append(own.std(correction=0) + _LEAST)
    return torch.stack(means), torch.stack(deviations)
