"""Retraining from scratch without the examples to forget: exact unlearning, the reference for all others.

The healed model is what training would have given had the examples never been there, so it forgets whatever
they did; what it cannot forget is poison that was not found.

Cost: one training on the rest, and a copy of the rest in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from unpoison.data import TrainingSet
from unpoison.models import reinitialized
from unpoison.training import EpochRecord, Recipe, Trained, train
from unpoison.unlearners._methods import register
from unpoison.unlearners._unlearner import Unlearner, network_of, recipe_of, retained


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

    Arguments:
        lose_classes: allow that a class is left without examples.
    """

    lose_classes: bool = False

    def epochs_in(self, recipe: Recipe) -> int:
        """All of the recipe's."""
        return recipe.epochs

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
        start: nn.Module | None = None,
    ) -> Trained:
        """A model trained from scratch on the rest.

        A network that a recipe built is built again, by its own recipe or the one that is given. Of any other
        network the architecture is kept; all parameters are drawn anew and trained, frozen ones too, and the
        recipe says only how. (Where a pretrained part should stay as it is, fine-tune the last layers.)

        Arguments:
            start: the network that training began with, where that was a pretrained one: it is fine-tuned
                again, on the rest. It must never have seen the examples to forget.

        Raises:
            InputError: as `Unlearner.heal`, or the network has a module that cannot be reset.
        """
        rest = retained(training_set, forget, lose_classes=self.lose_classes, method="retrain")
        if start is None and (not isinstance(model, Trained) or model.own_model):
            start = reinitialized(network_of(model), seed=seed).requires_grad_(True)
        return train(rest, recipe_of(model, recipe), seed=seed, model=start, device=device, on_epoch=on_epoch)
