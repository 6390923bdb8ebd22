"""Several unlearners, and the best of their results, chosen without knowing the trigger.

The right duration or learning rate depends on network and data, and published comparisons choose it by the
attack's success on test images, which is not known in practice. Here a tenth of the kept examples is held out
and every candidate heals with the rest. Among the results that lose at most `tolerance` of the model's
accuracy on the held-out examples, the one is returned that predicts fewest of the examples to forget as
labelled. If all lose more, the model itself is returned, with an empty history.

It takes any examples where all candidates do.

Cost: that of all candidates together. Memory: one more copy of the network for each.

Limits: a model that has forgotten the images may still react to the trigger. The model was trained on the
held-out examples, so the accuracy on them measures what healing destroyed, and not the accuracy on new
images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch

from unpoison._option_checks import Fraction, check_options
from unpoison.errors import InputError, TrainingDivergedError
from unpoison.training import Trained
from unpoison.unlearners._unlearner import Healed, Request, Unlearner
from unpoison.unlearners._validation import best, held_out_indices, judged


@final
@dataclass(frozen=True, kw_only=True)
class BestOf(Unlearner):
    """The best of several unlearners, or of one with several settings.

    Arguments:
        candidates: one or more, tried in this order; one that diverges is skipped.
        tolerance: how much accuracy on held-out kept examples may be lost, in [0, 1].
        lose_classes: allow that a class is left without examples; so must the candidates.

    Raises:
        InputError: there is no candidate, or a value is out of its range.
    """

    uses_start: ClassVar[bool] = True
    candidates: tuple[Unlearner, ...]
    tolerance: Fraction = 0.01
    lose_classes: bool = False

    def __post_init__(self) -> None:
        if not self.candidates or not all(isinstance(one, Unlearner) for one in self.candidates):
            raise InputError(f"best-of: needs a tuple of one or more unlearners, found {self.candidates!r}")
        check_options("best-of", self)
        object.__setattr__(self, "any_examples", all(one.any_examples for one in self.candidates))

    def _heal(self, request: Request) -> Healed:
        learn, out = held_out_indices(request.rest, seed=request.seed)
        poison, validation = request.forget, request.rest.subset(out)
        together = request.examples.subset(torch.cat([request.kept[learn], request.forgotten]))
        to_forget = torch.arange(len(learn), len(together))
        victim = judged(request.copied(), poison, validation)
        tried: dict[int, Trained] = {}
        judgements, failure = [], None
        for number_done, candidate in enumerate(self.candidates, 1):
            try:
                healed = candidate.heal(
                    request.given,
                    together,
                    to_forget,
                    reference=request.reference,
                    recipe=request.recipe,
                    start=request.start if candidate.uses_start else None,
                    seed=request.seed,
                    device=request.device,
                    progress=request.progress,
                )
            except TrainingDivergedError as error:
                failure = error
            else:
                judgements.append(judged(healed.model, poison, validation))
                tried[id(judgements[-1])] = healed
            if request.progress is not None:
                request.progress("candidates", number_done, len(self.candidates))
        if failure is not None and not tried:
            raise failure
        chosen = tried.get(id(best(judgements, victim, tolerance=self.tolerance)))
        if chosen is None:
            return request.healed(request.network, [])
        return Healed(chosen.model, chosen.history, chosen.recipe, chosen.own_model, chosen.tuning)
