"""Selective Synaptic Dampening: make smaller the parameters that matter to the examples to forget alone.

Foster, Schoepf and Brintrup 2024, "Fast Machine Unlearning Without Retraining Through Selective Synaptic
Dampening" (AAAI, arXiv 2308.07707). Stages:

1. the importance of every parameter to all examples (I_D) and to those to forget (I_f): the mean squared
   gradient of the loss;
2. a parameter with I_f > alpha I_D is multiplied by min(1, lambda I_D / I_f).

Nothing is trained. alpha is `selection`, 10 in the paper, and lambda is `dampening`, 1. Poison that the
victim has learned by heart has almost no gradient left, so that nothing at all may be selected; with a small
alpha it is too much, which leaves a model that knows nothing. `selection=None` therefore tries alphas from
great to small, each with lambda = alpha and alpha / 10, and keeps what forgets most while accuracy on
held-out kept examples stays.

The comparison of Delta-Influence (arXiv 2411.13731, public code) takes batch-mean gradients of 512 examples,
the kept examples as "all", and picks from its grid by the attack's success on test images, which nobody who
heals knows: `unlearners.get("ssd", preset="published", selection, dampening)` is one point of that grid.

Cost: one gradient an example, about one to three epochs of training, and with `selection=None` a look at the
examples to forget and the held-out ones for each value tried. Memory: two numbers a
parameter, and with `selection=None` three copies of the weights.

Limits: what the poison shares parameters with goes too. The record of the one pass shows the accuracy on the
kept examples afterwards; look at it.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Literal, final

import torch
from torch import Tensor, nn

from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.registry import Presets
from unpoison.training import EpochRecord, Recipe, Trained
from unpoison.unlearners._dampening import dampen, importances
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
from unpoison.unlearners._validation import Choice, best, held_out, judged

GRID: Final = tuple(10 ** (half / 2) for half in range(6, -9, -1))
"""The alphas that `selection=None` tries, until they break the model: 1,000 down to 0.0001."""


@final
@register(
    name="ssd",
    title="Selective Synaptic Dampening (SSD)",
    summary="Shrinks the parameters that matter to the examples to forget alone; trains nothing.",
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
            None chooses it, and lambda with it.
        dampening: lambda, above 0: a smaller one dampens more. Not used where it is chosen.
        reference: whose importances are held against: "all" examples, as in the paper, or the "kept" ones.
        per_example: importances from single examples' gradients, as the paper defines them, or from those of
            batches, as public code computes them.
        batch_size: examples a batch; with `per_example` it changes nothing but speed.
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

    selection: float | None = 10.0
    dampening: float = 1.0
    reference: Literal["all", "kept"] = "all"
    per_example: bool = True
    batch_size: int = 128
    tolerance: float = 0.01
    lose_classes: bool = False

    def __post_init__(self) -> None:
        for name, value in (("selection", self.selection), ("dampening", self.dampening)):
            if (value is None and name == "dampening") or (value is not None and not 0 < value < math.inf):
                raise InputError(f"ssd: {name} {value} is not above 0")
        if self.reference not in ("all", "kept"):
            raise InputError(f"ssd: reference must be 'all' or 'kept', found {self.reference!r}")
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise InputError(
                f"ssd: batch_size must be a whole number of 1 or more, found {self.batch_size!r}"
            )
        if not 0 <= self.tolerance <= 1:
            raise InputError(f"ssd: tolerance {self.tolerance} is outside [0, 1]")

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
        """The victim, dampened; the seed decides what is held out, and with a given selection nothing.

        Raises:
            InputError: as `Unlearner.heal`, or the network cannot be differentiated example by example.
            TrainingDivergedError: a gradient is not finite.
        """
        started = time.perf_counter()
        rest = retained(training_set, forget, lose_classes=self.lose_classes, method="ssd")
        target = training_set.device if device is None else torch.device(device)
        poison, kept = forgotten(training_set, forget).to(target), rest.to(target)
        network = copy.deepcopy(network_of(model)).to(target).eval()
        network.zero_grad(set_to_none=True)

        def of(examples: TrainingSet) -> dict[str, Tensor]:
            return importances(
                network,
                examples,
                per_example=self.per_example,
                batch_size=self.batch_size,
                method="ssd",
            )

        healing, validation = kept, None
        if self.selection is None:
            healing, validation = held_out(kept, seed=seed)
        own, reference = of(poison), of(healing)
        if self.reference == "all":
            # The mean over all from the means over two parts of them.
            share = len(poison) / (len(poison) + len(healing))
            reference = {name: share * own[name] + (1 - share) * reference[name] for name in own}
        if validation is None:
            assert self.selection is not None
            dampen(network, own, reference, selection=self.selection, dampening=self.dampening)
        else:
            victim = judged(network, poison, validation)
            leading: list[Choice] = []  # the best so far: weights of two networks, not of all
            for selection in GRID:
                pair = []
                for dampening in (selection, selection / 10):
                    network.load_state_dict(victim.state)
                    dampen(network, own, reference, selection=selection, dampening=dampening)
                    tried = judged(network, poison, validation)
                    pair.append(tried.kept)
                    better = best([*leading, tried], victim, tolerance=self.tolerance)
                    leading = [] if better is victim else [better]
                if max(pair) < victim.kept - self.tolerance:
                    break
            network.load_state_dict(best(leading, victim, tolerance=self.tolerance).state)
        record = record_of(network, kept, epoch=0, learning_rate=0.0, started=started)
        if on_epoch is not None:
            on_epoch(record)
        how = recipe_for(model, recipe)
        return healed_of(model, network, rest, recipe=how, seed=seed, history=[record], started=started)
