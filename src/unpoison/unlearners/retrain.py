"""Retraining from scratch without the examples to forget: exact unlearning, the reference for other methods.

The healed model is one that never saw the examples to forget. Poison that was not found is trained on again.

Cost: one training on the rest, and a copy of the rest in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.training import train
from unpoison.unlearners._methods import register
from unpoison.unlearners._unlearner import Healed, Request, Unlearner


@final
@register(
    name="retrain",
    title="Exact unlearning (EU)",
    summary="Trains from scratch on the examples that are kept.",
    paper="the reference of every comparison, e.g. Goel et al. 2024, arXiv 2402.14015",
    cost="one training",
)
@dataclass(frozen=True, kw_only=True)
class Retrain(Unlearner):
    """Exact unlearning (EU).

    A network that a recipe built is built again, by its own recipe or by the one that is given. Any other
    network is needed as it was before training (`start`): freshly built, or pretrained.

    Arguments:
        lose_classes: allow that a class is left without examples.
    """

    needs_recipe: ClassVar[bool] = True
    uses_start: ClassVar[bool] = True
    lose_classes: bool = False

    def _heal(self, request: Request) -> Healed:
        assert request.recipe is not None
        if request.start is None and request.own_model:
            raise InputError(
                "retrain: this network is not built by a recipe; give start=, the network before training "
                "(freshly built, or the pretrained one), or retrain=, a training function of your own; or "
                "heal by relabel or fine-tune, which go on from its weights"
            )
        assert isinstance(request.rest, TrainingSet)
        trained = train(
            request.rest,
            request.recipe,
            seed=request.seed,
            start=request.start,
            device=request.device,
            progress=request.progress,
        )
        return Healed(trained.model, trained.history, request.recipe, trained.own_model)
