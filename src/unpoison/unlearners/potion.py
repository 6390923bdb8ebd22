"""Potion: dampening with a strength that is raised until the examples to forget are forgotten.

Schoepf, Foster and Brintrup 2024, "Potion: Towards Poison Unlearning" (arXiv 2406.09173), for the case that
only a part of the poison was found. Stages:

1. the importance of every parameter to the kept examples and to those to forget. XLF, the paper's own: the
   mean absolute gradient of the norm of the logits, which needs no labels and is robust to outliers. ASSD,
   its predecessor (arXiv 2402.10098): the mean squared gradient of the loss, as in `SSD`;
2. the selection threshold alpha is the p-th percentile of all parameters' ratios of the two importances, with
   p = 100 - ln(1 + 100 s); lambda is 1;
3. Poison Trigger Neutralisation: s begins at the forgotten fraction of the examples divided by 25 and is
   multiplied by 1.1, each time from the original weights, until the share of the examples to forget that is
   predicted as labelled has fallen to `stop_at` (rho) times that of the model.

The search needs neither the trigger nor test images. The public scripts sweep rho from 0 to 0.75. Public code
takes the gradients of batches of 512 in place of single examples' (preset "published").

Cost: one gradient an example, about one to three epochs of training, and a forward pass over the examples to
forget for each of tens of steps of the search. Memory: three numbers a parameter.

Limits: a parameter that matters less to the examples to forget than to the rest is never dampened, so the
search may end before they are forgotten, as with ASSD on poison that the model has fit perfectly. Clean
behaviour that shares parameters with the poison is lost, too; the record shows the accuracy on the kept
examples afterwards.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, final

import torch
from torch import Tensor

from unpoison._option_checks import PositiveFloat, PositiveInt
from unpoison.registry import Presets
from unpoison.training import accuracy
from unpoison.unlearners._dampening import cross_entropy_of_each, dampen, importances, logit_norm, ratios
from unpoison.unlearners._methods import register
from unpoison.unlearners._unlearner import BATCH_SIZE, Healed, Request, Unlearner, record_of


@final
@register(
    name="potion",
    title="Potion (XLF and Poison Trigger Neutralisation)",
    summary="Dampens as SSD does, with a strength that is raised until the examples are forgotten.",
    paper="Schoepf et al. 2024, arXiv 2406.09173",
    cost="one gradient an example, one to three epochs of training, and a short search",
    presets=("default", "published"),
    reads_forget_set=True,
)
@dataclass(frozen=True, kw_only=True)
class Potion(Unlearner):
    """Potion: XLF importances and Poison Trigger Neutralisation.

    Arguments:
        importance: "xlf", the paper's own, or "assd".
        stop_at: rho in [0, 1): the search ends when the share of the examples to forget that is predicted as
            labelled has fallen to this fraction of the model's.
        start: the first s, as a fraction of the forgotten fraction of the examples, above 0.
        step: the factor on s, above 1.
        tries: the most steps of the search; the last is kept if none was enough. It ends sooner when a
            further step would change nothing.
        per_example: gradients of single examples, or of batches, as in public code.
        batch_size: examples a batch; with `per_example` it changes speed only.
        lose_classes: allow that a class is left without examples.

    Raises:
        InputError: a value is out of its range.
    """

    PRESETS: ClassVar[Presets] = {"default": {}, "published": {"per_example": False, "batch_size": 512}}

    any_examples: ClassVar[bool] = True
    importance: Literal["xlf", "assd"] = "xlf"
    stop_at: Annotated[float, "[0, 1)"] = 0.2
    start: PositiveFloat = 1 / 25
    step: Annotated[float, "(1, inf)"] = 1.1
    tries: PositiveInt = 500
    per_example: bool = True
    batch_size: PositiveInt = 128
    lose_classes: bool = False

    def _heal(self, request: Request) -> Healed:
        started = time.perf_counter()
        poison, kept = request.forget, request.rest
        network = request.copied()
        own, reference = (
            importances(
                network,
                examples,
                value=logit_norm if self.importance == "xlf" else cross_entropy_of_each,
                power=1 if self.importance == "xlf" else 2,
                per_example=self.per_example,
                batch_size=self.batch_size,
                method="potion",
            )
            for examples in (poison, kept)
        )
        ascending = ratios(own, reference)
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        enough = self.stop_at * accuracy(network, poison, batch_size=BATCH_SIZE).rate
        strength = self.start * len(poison) / (len(poison) + len(kept))
        for _ in range(self.tries if len(ascending) else 0):
            network.load_state_dict(before)
            threshold = percentile(ascending, 100 - math.log1p(100 * strength))
            dampen(network, own, reference, selection=threshold, dampening=1.0)
            # With lambda 1, parameters below a ratio of 1 are selected and left as they are.
            if accuracy(network, poison, batch_size=BATCH_SIZE).rate <= enough or float(threshold) <= 1:
                break
            strength *= self.step
        record = record_of(network, kept, epoch=0, learning_rate=0.0, started=started)
        record.tell(request.progress, 1, stage="dampening")
        return request.healed(network, [record])


def percentile(ascending: Tensor, percent: float) -> Tensor:
    """The `percent`-th percentile of sorted numbers, linear between neighbours; a scalar.

    >>> float(percentile(torch.tensor([1.0, 2.0, 4.0]), 75))
    3.0
    """
    place = min(max(percent, 0.0), 100.0) / 100 * (len(ascending) - 1)
    low = math.floor(place)
    return torch.lerp(ascending[low], ascending[min(low + 1, len(ascending) - 1)], place - low)
