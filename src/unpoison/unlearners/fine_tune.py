"""Fine-tuning on the examples that are kept: catastrophic forgetting (CF).

The model is trained further without the examples to forget, which it then forgets (Goel et al. 2022, arXiv
2201.06640), with all layers (CF) or the last k alone (CF-k). The comparison of Delta-Influence (arXiv
2411.13731, public code) uses all layers and the whole recipe again, with the learning rate and epochs of
training from scratch: `unlearners.get("fine-tune", preset="published")`. Our default has half the epochs and
twice the learning rate, since forgetting depends most on the learning rate (measured in docs/unlearning.md).

Cost: `epochs` of a training; with the last k layers the backward pass ends at the first of them. Memory: two
copies of the network and one of the kept examples.

Other inputs than 8-bit images are read batch by batch as the dataset gives them, without augmentation; a
network keeps its precision, its frozen parts and its own dropout and batch norm. Where it is not known how
the network was trained, optimiser and learning rate are looked for (`_further`), which the result states.

Limits: poison that was not found is trained on again. With the last k layers, the frozen layers keep what
they learned from the poison.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, final

from torch import nn

from unpoison._option_checks import PositiveFloat, PositiveInt
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.registry import Presets
from unpoison.training import Recipe, train
from unpoison.unlearners._further import found_training, shortened, train_further
from unpoison.unlearners._methods import register
from unpoison.unlearners._unlearner import Healed, Request, Unlearner


@final
@register(
    name="fine-tune",
    title="Catastrophic forgetting (CF)",
    summary="Trains the model further, on the examples that are kept.",
    paper="Goel et al. 2022, arXiv 2201.06640; as compared by Delta-Influence, arXiv 2411.13731",
    cost="half a training by default; one training as published",
    presets=("default", "published"),
)
@dataclass(frozen=True, kw_only=True)
class FineTune(Unlearner):
    """Catastrophic forgetting.

    Arguments:
        layers: "all", or the number of last modules with parameters, in the order of their definition, that
            are trained. The modules before them are frozen: parameters, batch norm statistics and dropout.
        epochs: the fraction of the recipe's epochs that is trained, in (0, 1]; rounded up to whole epochs.
            Without a recipe, of 10 epochs.
        learning_rate: a factor on the recipe's learning rate, above 0; None is 2. Without a recipe, on the
            one that is found; None is 1.
        schedule: "cosine" falls to zero from the first step; "recipe" keeps the recipe's schedule, warm-up
            and milestones, and needs all of its epochs and a recipe.
        lose_classes: allow that a class is left without examples.

    Raises:
        InputError: a value is out of its range, or the schedule is "recipe" with a part of the epochs.
    """

    PRESETS: ClassVar[Presets] = {
        "default": {},
        "published": {"layers": "all", "epochs": 1.0, "learning_rate": 1.0, "schedule": "recipe"},
    }

    any_examples: ClassVar[bool] = True
    layers: Literal["all"] | PositiveInt = "all"
    epochs: Annotated[float, "(0, 1]"] = 0.5
    learning_rate: PositiveFloat | None = None
    schedule: Literal["cosine", "recipe"] = "cosine"
    lose_classes: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule == "recipe" and self.epochs != 1:
            raise InputError("fine-tune: the recipe's own schedule needs all of its epochs; set epochs to 1")

    def recipe_from(self, recipe: Recipe) -> Recipe:
        """The recipe of fine-tuning, given that of training.

        >>> FineTune().recipe_from(Recipe.preset("resnet18-40")).epochs
        20
        """
        rate = recipe.learning_rate * (2.0 if self.learning_rate is None else self.learning_rate)
        if self.schedule == "recipe":
            return replace(recipe, learning_rate=rate)
        changed = shortened(recipe, epochs=self._epochs(recipe.epochs), learning_rate=rate, schedule="cosine")
        assert isinstance(changed, Recipe)
        return changed

    def _epochs(self, of: int) -> int:
        return max(1, math.ceil(round(of * self.epochs, 9)))

    def _heal(self, request: Request) -> Healed:
        start = request.trainable()
        if self.layers != "all":
            _freeze_all_but_last(start, self.layers)
        if request.recipe is None:
            return self._without_recipe(request, start)
        recipe = self.recipe_from(request.recipe)
        if not isinstance(request.rest, TrainingSet):
            history = train_further(request, start, request.rest, recipe)
            return request.healed(start, history, recipe=recipe)
        trained = train(
            request.rest,
            recipe,
            seed=request.seed,
            start=start,
            device=request.device,
            progress=request.progress,
        )
        return request.healed(trained.model, trained.history, recipe=recipe)

    def _without_recipe(self, request: Request, start: nn.Module) -> Healed:
        if self.schedule == "recipe":
            raise InputError("fine-tune: schedule 'recipe' needs the recipe of the training; give recipe=")
        found, told = found_training(request, start)
        training = shortened(
            found,
            epochs=self._epochs(found.epochs),
            learning_rate=found.learning_rate * (1.0 if self.learning_rate is None else self.learning_rate),
            schedule="cosine",
        )
        history = train_further(request, start, request.rest, training)
        return request.healed(start, history, tuning=told)


def _freeze_all_but_last(network: nn.Module, count: int) -> None:
    """Freeze, in place, what is defined before the last `count` modules that hold parameters."""
    modules = list(network.modules())
    holders = [module for module in modules if next(module.parameters(recurse=False), None) is not None]
    if count > len(holders):
        raise InputError(f"fine-tune: layers {count} is more than the {len(holders)} modules with parameters")
    thawed = set(holders[-count:])
    kept = {id(parameter) for module in thawed for parameter in module.parameters(recurse=False)}
    for parameter in network.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)
    for module in modules[: modules.index(holders[-count])]:
        if thawed.isdisjoint(module.modules()):
            # The trainer copies the network and puts it in training mode; hooks are kept by both.
            module.register_forward_pre_hook(_keep_in_eval_mode)


def _keep_in_eval_mode(module: nn.Module, inputs: Any) -> None:
    module.training = False
