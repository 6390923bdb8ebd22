"""Potion: dampening whose strength is searched for until the examples to forget are forgotten.

Schoepf, Foster and Brintrup 2024, "Potion: Towards Poison Unlearning" (arXiv 2406.09173), made for the case
that only a part of the poison was found. Stages:

1. the importance of every parameter to the kept examples and to those to forget. XLF, the paper's own: the
   mean magnitude of the gradient of the logits' length, without labels and less swayed by outliers. ASSD,
   which came before (arXiv 2402.10098): the mean squared gradient of the loss, as in `SSD`;
2. the selection threshold alpha is the p-th percentile of all parameters' ratios of the two importances,
   with p = 100 - ln(1 + 100 s); lambda is 1;
3. Poison Trigger Neutralisation: s begins at the forgotten share of the examples over 25 and is multiplied
   by 1.1, each time from the victim anew, until the model answers at most `stop_at` times as many of the
   examples to forget as they are labelled as the victim did.

The search needs neither the trigger nor any test image. `stop_at` is rho; the public scripts sweep 0 to 0.75.
Public code takes the gradients of batches of 512 in place of single examples' (`unlearners.get("potion", preset="published")`).

Cost: one gradient an example, about one to three epochs of training, and a forward pass over the examples to
forget for each step of the search, of which there are tens. Memory: three numbers a parameter.

Limits: a parameter that matters less to the examples to forget than to the rest is never dampened, so the
search may end without having reached its end, as ASSD does on poison learned by heart, which has hardly any
gradient left. What the poison shares parameters with goes too; the record of the one pass shows the accuracy
on the kept examples afterwards.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.registry import Presets
from unpoison.training import EpochRecord, Recipe, Trained, accuracy
from unpoison.unlearners._dampening import answer_norm, cross_entropy, dampen, importances, ratios
from unpoison.unlearners._methods import register
from unpoison.unlearners._record import record_of
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
    name="potion",
    title="Potion (XLF and Poison Trigger Neutralisation)",
    summary="Dampens as SSD does, ever more strongly until the examples to forget are forgotten.",
    paper="Schoepf et al. 2024, arXiv 2406.09173",
    cost="one gradient an example, one to three epochs of training, and a short search",
    presets=("default", "published"),
    reads_forget_set=True,
)
@dataclass(frozen=True, kw_only=True)
class Potion(Unlearner):
    """Potion: XLF importances and the search for the strength (PTN).

    Arguments:
        importance: "xlf", the paper's own, or "assd".
        stop_at: rho in [0, 1): the search ends when the share of the examples to forget that is still
            answered as labelled has fallen to this part of the victim's.
        start: s at first, as a part of the forgotten share of the examples, above 0.
        step: what s is multiplied by, above 1.
        tries: the most steps of the search; the last is kept when none was enough. It ends sooner when a
            further step would change nothing.
        per_example: gradients of single examples, or of batches, as public code computes them.
        batch_size: examples a batch; with `per_example` it changes nothing but speed.
        lose_classes: allow that a class is left without examples.

    Raises:
        InputError: a value is out of its range.
    """

    PRESETS: ClassVar[Presets] = {
        "default": {},
        "published": {"per_example": False, "batch_size": 512},
    }

    importance: Literal["xlf", "assd"] = "xlf"
    stop_at: float = 0.2
    start: float = 1 / 25
    step: float = 1.1
    tries: int = 500
    per_example: bool = True
    batch_size: int = 128
    lose_classes: bool = False

    def __post_init__(self) -> None:
        if self.importance not in ("xlf", "assd"):
            raise InputError(f"potion: importance must be 'xlf' or 'assd', found {self.importance!r}")
        if not 0 <= self.stop_at < 1:
            raise InputError(f"potion: stop_at {self.stop_at} is outside [0, 1)")
        if not 0 < self.start < math.inf:
            raise InputError(f"potion: start {self.start} is not above 0")
        if not 1 < self.step < math.inf:
            raise InputError(f"potion: step {self.step} is not above 1")
        for name in ("tries", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"potion: {name} must be a whole number of 1 or more, found {value!r}")

    def epochs_in(self, recipe: Recipe) -> int:
        """One record, of all of it."""
        return 1

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
        """The victim, dampened as strongly as it takes; nothing is random.

        Raises:
            InputError: as `Unlearner.heal`, or the network cannot be differentiated example by example.
            TrainingDivergedError: a gradient is not finite.
        """
        started = time.perf_counter()
        rest = retained(training_set, forget, lose_classes=self.lose_classes, method="potion")
        target = training_set.device if device is None else torch.device(device)
        poison, kept = forgotten(training_set, forget).to(target), rest.to(target)
        network = copy.deepcopy(network_of(model)).to(target).eval()
        network.zero_grad(set_to_none=True)

        def of(examples: TrainingSet) -> dict[str, Tensor]:
            return importances(
                network,
                examples,
                value=answer_norm if self.importance == "xlf" else cross_entropy,
                power=1 if self.importance == "xlf" else 2,
                per_example=self.per_example,
                batch_size=self.batch_size,
                method="potion",
            )

        own, reference = of(poison), of(kept)
        ascending = ratios(own, reference)
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        enough = self.stop_at * accuracy(network, poison, batch_size=128).rate
        strength = self.start * len(poison) / len(training_set)
        for _ in range(self.tries if len(ascending) else 0):
            network.load_state_dict(before)
            threshold = percentile(ascending, 100 - math.log1p(100 * strength))
            dampen(network, own, reference, selection=threshold, dampening=1.0)
            # With lambda 1 what matters less to the examples to forget is selected and left as it is.
            if accuracy(network, poison, batch_size=128).rate <= enough or float(threshold) <= 1:
                break
            strength *= self.step
        record = record_of(network, kept, epoch=0, learning_rate=0.0, started=started)
        if on_epoch is not None:
            on_epoch(record)
        how = recipe_for(model, recipe)
        return healed_of(model, network, rest, recipe=how, seed=seed, history=[record], started=started)


def percentile(ascending: Tensor, percent: float) -> Tensor:
    """The `percent`-th percentile of sorted numbers, linear between neighbours; a scalar.

    >>> float(percentile(torch.tensor([1.0, 2.0, 4.0]), 75))
    3.0
    """
    place = min(max(percent, 0.0), 100.0) / 100 * (len(ascending) - 1)
    low = math.floor(place)
    return torch.lerp(ascending[low], ascending[min(low + 1, len(ascending) - 1)], place - low)
