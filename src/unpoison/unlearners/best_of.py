"""Several healings, and the best of them as far as it can be told without knowing the trigger.

How long to climb, or at what learning rate, hangs on network and data, and published comparisons chose by the
attack's success on test images, which nobody who heals knows. Here a tenth of the kept examples is held out,
every candidate heals with the rest, and the one is taken that answers fewest of the examples to forget as
they are labelled, among those that lose no more than `tolerance` of the victim's accuracy on the held-out
ones. Where none does, the victim is returned as it is; its history then says so by being empty.

Cost: that of all candidates together. Memory: one more copy of the network for each.

Limits: a model that forgets the very images may still know the trigger; and the victim was trained on what is
held out, so the accuracy says how much was broken, not how the model does on new images.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor, nn

from unpoison.data import TrainingSet
from unpoison.errors import InputError, TrainingDivergedError
from unpoison.training import EpochRecord, Recipe, Trained
from unpoison.unlearners._unlearner import (
    Unlearner,
    forgotten,
    healed_of,
    network_of,
    recipe_for,
    retained,
    with_weights,
)
from unpoison.unlearners._validation import best, held_out, judged


@final
@dataclass(frozen=True, kw_only=True)
class BestOf(Unlearner):
    """The best of several unlearners, or of one with several settings.

    Arguments:
        candidates: one or more, tried in this order; one that diverges is passed over.
        tolerance: how much accuracy on held-out kept examples may be lost, in [0, 1].
        lose_classes: allow that a class is left without examples; so must the candidates.

    Raises:
        InputError: there is no candidate, or a value is out of its range.
    """

    candidates: tuple[Unlearner, ...]
    tolerance: float = 0.01
    lose_classes: bool = False

    def __post_init__(self) -> None:
        if not self.candidates or not all(isinstance(one, Unlearner) for one in self.candidates):
            raise InputError(f"best-of: needs a tuple of one or more unlearners, found {self.candidates!r}")
        if not 0 <= self.tolerance <= 1:
            raise InputError(f"best-of: tolerance {self.tolerance} is outside [0, 1]")

    def epochs_in(self, recipe: Recipe) -> int:
        """Those of all candidates together."""
        return sum(one.epochs_in(recipe) for one in self.candidates)

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
        """What the best candidate gave; its seconds are those of all.

        `on_epoch` is told the epochs of every candidate, numbered through; the history holds the best one's.

        Raises:
            InputError: as `Unlearner.heal`, or the classes are too small to hold any example out.
            TrainingDivergedError: every candidate diverged.
        """
        started = time.perf_counter()
        rest = retained(training_set, forget, lose_classes=self.lose_classes, method="best-of")
        target = training_set.device if device is None else torch.device(device)
        poison = forgotten(training_set, forget)
        kept, validation = held_out(rest, seed=seed)
        together = TrainingSet(
            torch.cat([kept.images, poison.images]),
            torch.cat([kept.labels, poison.labels]),
            training_set.class_names,
            training_set.name,
        ).to(target)
        to_forget = torch.arange(len(kept), len(together))
        poison, validation = poison.to(target), validation.to(target)
        own = network_of(model)
        victim = judged(with_weights(own, own.state_dict(), target), poison, validation)
        told = 0

        def tell(record: EpochRecord) -> None:
            nonlocal told
            if on_epoch is not None:
                on_epoch(replace(record, epoch=told))
            told += 1

        tried: dict[int, Trained] = {}
        judgements, failure = [], None
        for unlearner in self.candidates:
            try:
                healed = unlearner.heal(model, together, to_forget, recipe=recipe, seed=seed, on_epoch=tell)
            except TrainingDivergedError as error:
                failure = error
                continue
            judgements.append(judged(healed.model, poison, validation))
            tried[id(judgements[-1])] = healed
        if failure is not None and not tried:
            raise failure
        chosen = tried.get(id(best(judgements, victim, tolerance=self.tolerance)))
        return healed_of(
            model,
            with_weights(own, own.state_dict(), target) if chosen is None else chosen.model,
            rest,
            recipe=recipe_for(model, recipe) if chosen is None else chosen.recipe,
            seed=seed,
            history=() if chosen is None else chosen.history,
            started=started,
        )
