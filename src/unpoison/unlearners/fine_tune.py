"""Fine-tuning on the examples that are kept: catastrophic forgetting (CF).

The victim is trained on without the examples to forget, and what they taught fades because nothing repeats
it. Goel et al. 2022 (arXiv 2201.06640) name it, with all layers (CF) or the last k alone (CF-k). The
comparison of Delta-Influence (arXiv 2411.13731, public code) runs it with all layers and the victim's whole
recipe again, learning rate and epochs as from scratch, so nearly a retraining: that is
`unlearners.get("fine-tune", preset="published")`. Ours takes half the epochs by default, and twice the learning rate, because it is the
learning rate that makes the victim forget (docs/unlearning.md has the numbers).

Cost: `epochs` of a training; with the last k layers the backward pass ends at the first of them. Memory: two
copies of the network and one of the kept examples.

Limits: poison that was not found is trained on again. With the last k layers, what the frozen layers learned
from the poison stays.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.registry import Presets
from unpoison.training import EpochRecord, Recipe, Trained, train
from unpoison.unlearners._methods import register
from unpoison.unlearners._unlearner import Unlearner, network_of, recipe_for, retained, with_weights


@final
@register(
    name="fine-tune",
    title="Catastrophic forgetting (CF)",
    summary="Trains the victim on, with the examples that are kept.",
    paper="Goel et al. 2022, arXiv 2201.06640; as compared by Delta-Influence, arXiv 2411.13731",
    cost="half a training by default; one training as published",
    presets=("default", "published"),
)
@dataclass(frozen=True, kw_only=True)
class FineTune(Unlearner):
    """Catastrophic forgetting.

    Arguments:
        layers: "all", or how many of the last modules that hold parameters, in the order of their definition.
            The modules before them are frozen: parameters, batch norm statistics and dropout.
        epochs: of the recipe's epochs, the part that is trained, in (0, 1]; rounded up to whole epochs.
        learning_rate: what the recipe's learning rate is multiplied by, above 0.
        schedule: "cosine" falls to zero from the first step; "recipe" keeps the recipe's schedule, warm-up
            and milestones and needs all of its epochs.
        lose_classes: allow that a class is left without examples.

    Raises:
        InputError: a value is out of its range, or "recipe" is asked of a part of the epochs.
    """

    PRESETS: ClassVar[Presets] = {
        "default": {},
        "published": {"layers": "all", "epochs": 1.0, "learning_rate": 1.0, "schedule": "recipe"},
    }

    layers: Literal["all"] | int = "all"
    epochs: float = 0.5
    learning_rate: float = 2.0
    schedule: Literal["cosine", "recipe"] = "cosine"
    lose_classes: bool = False

    def __post_init__(self) -> None:
        if self.layers != "all" and (
            isinstance(self.layers, bool) or not isinstance(self.layers, int) or self.layers < 1
        ):
            raise InputError(
                f"fine-tune: layers must be 'all' or a whole number of 1 or more, found {self.layers!r}"
            )
        if not 0 < self.epochs <= 1:
            raise InputError(
                f"fine-tune: epochs {self.epochs} is outside (0, 1]; it is a part of the recipe's"
            )
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"fine-tune: learning_rate {self.learning_rate} is not above 0; it is a factor")
        if self.schedule not in ("cosine", "recipe"):
            raise InputError(f"fine-tune: schedule must be 'cosine' or 'recipe', found {self.schedule!r}")
        if self.schedule == "recipe" and self.epochs != 1:
            raise InputError("fine-tune: the recipe's own schedule needs all of its epochs; set epochs to 1")

    def recipe_from(self, recipe: Recipe) -> Recipe:
        """How the victim is trained on, given how it was trained.

        >>> FineTune().recipe_from(Recipe.preset("resnet18-40")).epochs
        20
        >>> from unpoison import unlearners
        >>> unlearners.get("fine-tune", preset="published").recipe_from(Recipe.preset("resnet18-40")) == Recipe.preset("resnet18-40")
        True
        """
        changes: dict[str, Any] = {"learning_rate": recipe.learning_rate * self.learning_rate}
        if self.schedule == "cosine":
            changes |= {
                "epochs": max(1, math.ceil(round(recipe.epochs * self.epochs, 9))),
                "schedule": "cosine",
                "milestones": (),
                "warmup_epochs": 0.0,
            }
        return replace(recipe, **changes)

    def epochs_in(self, recipe: Recipe) -> int:
        """Those of the shortened recipe."""
        return self.recipe_from(recipe).epochs

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
        """The victim, trained on with the rest; its recipe is the one of this fine-tuning.

        Raises:
            InputError: as `Unlearner.heal`, or the network has fewer modules with parameters than `layers`.
        """
        rest = retained(training_set, forget, lose_classes=self.lose_classes, method="fine-tune")
        how = self.recipe_from(recipe_for(model, recipe))
        victim = network_of(model)
        start = copy.deepcopy(victim).requires_grad_(True)
        if self.layers != "all":
            _freeze_all_but_last(start, self.layers)
        trained = train(rest, how, seed=seed, model=start, device=device, on_epoch=on_epoch)
        # The weights go into a fresh copy, which has the victim's hooks and flags and none of the freezing.
        target = next((parameter.device for parameter in trained.model.parameters()), None)
        healed = with_weights(victim, trained.model.state_dict(), target)
        own_model = model.own_model if isinstance(model, Trained) else True
        return replace(trained, model=healed, own_model=own_model)


def _freeze_all_but_last(network: nn.Module, count: int) -> None:
    """Freeze, in place, what is defined before the last `count` modules that hold parameters."""
    modules = list(network.modules())
    holders = [module for module in modules if next(module.parameters(recurse=False), None) is not None]
    if count > len(holders):
        raise InputError(f"fine-tune: layers {count} is more than the {len(holders)} modules with parameters")
    thawed = set(holders[-count:])
    network.requires_grad_(False)
    for module in thawed:
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(True)
    for module in modules[: modules.index(holders[-count])]:
        if thawed.isdisjoint(module.modules()):
            # The trainer puts the whole network in training mode; a hook survives that, and being copied.
            module.register_forward_pre_hook(_keep_in_eval_mode)


def _keep_in_eval_mode(module: nn.Module, inputs: Any) -> None:
    module.training = False
