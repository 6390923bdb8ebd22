"""Selective Synaptic Dampening: shrink the parameters that matter most to the examples to forget.

Foster, Schoepf and Brintrup 2024, "Fast Machine Unlearning Without Retraining Through Selective Synaptic
Dampening" (AAAI, arXiv 2308.07707). Stages:

1. the importance of every parameter to all examples (I_D) and to those to forget (I_f): the mean squared
   gradient of the loss;
2. a parameter with I_f > alpha I_D is multiplied by min(1, lambda I_D / I_f).

Nothing is trained. alpha is `selection`, 10 in the paper, and lambda is `dampening`, 1. Poison that the model
has fit perfectly has almost no gradient, so that nothing may be selected; a small alpha selects too much and
destroys the model. `selection=None` therefore tries alphas from large to small, each with lambda = alpha and
alpha / 10, and keeps the result that forgets most while the accuracy on held-out kept examples stays.

The comparison of Delta-Influence (arXiv 2411.13731, public code) takes batch-mean gradients of 512 examples,
the kept examples as reference, and chooses from a grid by the attack's success on test images, which is not
known in practice; the preset "published", with `selection` and `dampening` set, is one point of that grid.

Cost: one gradient an example, about one to three epochs of training; with `selection=None` a forward pass
over the examples to forget and the held-out ones for each value tried. Memory: two numbers a parameter; with
`selection=None` three copies of the weights.

Limits: clean behaviour that shares parameters with the poison is lost, too. The record shows the accuracy on
the kept examples afterwards.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar, Final, Literal, final

from unpoison._option_checks import Fraction, PositiveFloat, PositiveInt
from unpoison.registry import Presets
from unpoison.unlearners._dampening import dampen, importances
from unpoison.unlearners._methods import register
from unpoison.unlearners._unlearner import Healed, Request, Unlearner, record_of
from unpoison.unlearners._validation import Choice, best, held_out, judged

GRID: Final = tuple(10 ** (half / 2) for half in range(6, -9, -1))
"""The alphas that `selection=None` tries, until accuracy is lost: 1,000 down to 0.0001."""


@final
@register(
    name="ssd",
    title="Selective Synaptic Dampening (SSD)",
    summary="Shrinks the parameters that matter most to the examples to forget; trains nothing.",
    paper="Foster et al. 2024, arXiv 2308.07707",
    cost="one gradient an example, one to three epochs of training",
    presets=("default", "published"),
    reads_forget_set=True,
)
@dataclass(frozen=True, kw_only=True)
class SSD(Unlearner):
    """Selective Synaptic Dampening.

    Arguments:
        selection: alpha, above 0: how many times as important a parameter must be to the examples to forget;
            None chooses it, and lambda.
        dampening: lambda, above 0: a smaller one dampens more. Not used with `selection=None`.
        reference: the examples of the reference importances: "all", as in the paper, or the "kept" ones.
        per_example: importances from the gradients of single examples, as in the paper, or of batches, as in
            public code.
        batch_size: examples a batch; with `per_example` it changes speed only.
        tolerance: with `selection=None`, how much accuracy on held-out kept examples may be lost, in [0, 1].
        lose_classes: allow that a class is left without examples.

    Raises:
        InputError: a value is out of its range.
    """

    PRESETS: ClassVar[Presets] = {
        "default": {},
        "published": {
            "selection": 10.0,
            "dampening": 1.0,
            "reference": "kept",
            "per_example": False,
            "batch_size": 512,
        },
    }

    any_examples: ClassVar[bool] = True
    selection: PositiveFloat | None = 10.0
    dampening: PositiveFloat = 1.0
    reference: Literal["all", "kept"] = "all"
    per_example: bool = True
    batch_size: PositiveInt = 128
    tolerance: Fraction = 0.01
    lose_classes: bool = False

    def _heal(self, request: Request) -> Healed:
        started = time.perf_counter()
        poison, kept = request.forget, request.rest
        network = request.copied()
        compared, validation = kept, None
        if self.selection is None:
            compared, validation = held_out(kept, seed=request.seed)
        own, reference = (
            importances(
                network,
                examples,
                per_example=self.per_example,
                batch_size=self.batch_size,
                method="ssd",
            )
            for examples in (poison, compared)
        )
        if self.reference == "all":
            # The mean over all, from the means over its two parts.
            share = len(poison) / (len(poison) + len(compared))
            reference = {name: share * own[name] + (1 - share) * reference[name] for name in own}
        if self.selection is not None:
            dampen(network, own, reference, selection=self.selection, dampening=self.dampening)
        elif validation is not None:
            victim = judged(network, poison, validation)
            leading: list[Choice] = []  # the best so far, so that few copies of the weights are kept
            for selection in GRID:
                accuracies = []
                for dampening in (selection, selection / 10):
                    network.load_state_dict(victim.state)
                    dampen(network, own, reference, selection=selection, dampening=dampening)
                    tried = judged(network, poison, validation)
                    accuracies.append(tried.kept)
                    better = best([*leading, tried], victim, tolerance=self.tolerance)
                    leading = [] if better is victim else [better]
                if max(accuracies) < victim.kept - self.tolerance:
                    break
            network.load_state_dict(best(leading, victim, tolerance=self.tolerance).state)
        record = record_of(network, kept, epoch=0, learning_rate=0.0, started=started)
        record.tell(request.progress, 1, stage="dampening")
        return request.healed(network, [record])
