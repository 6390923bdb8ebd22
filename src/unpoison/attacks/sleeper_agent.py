"""Sleeper Agent: a backdoor by gradient matching, whose trigger is in no training image.

Souri, Fowl, Chellappa, Goldblum and Goldstein 2022, "Sleeper Agent: Scalable Hidden Trigger Backdoors for
Neural Networks Trained from Scratch" (NeurIPS; arXiv 2106.08970), section 3 and algorithm 1.

Stages: choose as poisons the examples of the target class whose loss has the largest gradient on the
surrogates; compute the gradient that patched source images, labelled as the target, would give; move the
poisons within eps so that their gradient points the same way, by signed Adam on freshly augmented copies; a
few times on the way, train the surrogates from new parameters on the poisons as they are by then, and go on
against these; round to 8 bits.

Published (CIFAR-10): 1 % poisons, eps 16/255, 250 steps, four retrainings, one surrogate, an 8x8 coloured
patch at a random place in each image: `RandomPatchTrigger.coloured(8, seed=...)`. ResNet-18 then answers 85 %
of patched source images with the target, the mean over pairs of classes, some of which reach 99 %.

Departures: gradient norms are exact and computed for many examples at once (`vmap`); dropout is off; the
place of the patch follows from the image (see `RandomPatchTrigger`) and is not drawn anew.

Cost: that of gradient matching with one restart, and `retrainings` trainings of each surrogate, which are
most of it. Memory: as gradient matching, and for the choice one gradient for each of `norm_batch` examples.

Limits: the surrogate must be trained as the victim will be; success varies a great deal from pair to pair, so
one pair says little.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unpoison._seeds import derive_seed, generator
from unpoison.attacks._alignment import Alignment, Gradient, gradient_of, trained_parameters
from unpoison.attacks._attack import Attack
from unpoison.attacks._methods import register
from unpoison.attacks._signed_descent import Augmentation, SignedDescent, view_of_step
from unpoison.attacks._stamping import as_backdoor, chosen, device_of, networks, sources, targets
from unpoison.attacks._surrogates import reborn
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.models import preserved
from unpoison.registry import Presets
from unpoison.threats import Backdoor, Budget, Goal, PoisonSet
from unpoison.training import Recipe, train

_NAME = "sleeper-agent"


@final
@register(
    name="sleeper-agent",
    title="Sleeper Agent",
    summary="Moves images of the target class so that training on them teaches a trigger they lack.",
    paper="Souri et al. 2022, NeurIPS, arXiv 2106.08970",
    cost="250 double backward passes over the poisons and 4 trainings of each surrogate",
    presets=("published",),
    labels="clean",
    goals=("backdoor",),
    knowledge="the training set and a network trained as the victim will be",
    surrogates=1,
    accepts_surrogates=True,
)
@dataclass(frozen=True, kw_only=True)
class SleeperAgent(Attack):
    """The clean-label backdoor with a hidden trigger, for victims trained from scratch.

    Arguments:
        eps: the largest change of any pixel value, in 1/255.
        steps: of signed Adam, 1 or more.
        retrainings: how often the surrogates are trained anew, at even distances, 0 or more.
        recipe: how; a preset's name will do. Its model is not used: surrogates keep their architecture.
        choice: "gradient-norm" takes the examples with the largest gradients, "random" any.
        candidates: among how many examples of the target class the choice is made, at most.
        sources: how many patched images the gradient to match is the mean of, at most.
        step_size: of Adam, in standard deviations of each channel's pixels; divided by the number of
            surrogates; a tenth after 3/8, 5/8 and 7/8 of the steps.
        augmentation: what every poison goes through at every step; as `GradientMatching`.
        shift: the largest shift in pixels.
        flip: mirror half of the images.
        micro_batch: images differentiated at a time.
        norm_batch: examples whose gradients are held at a time while choosing.

    Raises:
        InputError: a value is out of its range.
    """

    PRESETS: ClassVar[Presets] = {
        "published": {},
    }

    eps: float = 16.0
    steps: int = 250
    retrainings: int = 4
    recipe: Recipe | str = "resnet18-40"
    choice: Literal["gradient-norm", "random"] = "gradient-norm"
    candidates: int = 5000
    sources: int = 5000
    step_size: float = 0.1
    augmentation: Augmentation = "translate"
    shift: int = 4
    flip: bool = True
    micro_batch: int = 128
    norm_batch: int = 16

    def __post_init__(self) -> None:
        least = {
            "steps": 1,
            "retrainings": 0,
            "candidates": 1,
            "sources": 1,
            "shift": 0,
            "micro_batch": 1,
            "norm_batch": 1,
        }
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise InputError(f"{_NAME}: {name} must be at least {bound}, found {getattr(self, name)}")
        if not 1 <= self.eps <= 255:
            raise InputError(f"{_NAME}: eps {self.eps} is outside [1, 255]; it is in 1/255")
        if not 0 < self.step_size < math.inf:
            raise InputError(f"{_NAME}: step_size {self.step_size} must be above 0")
        for name, choices in (
            ("choice", ("gradient-norm", "random")),
            ("augmentation", ("translate", "crop", "none")),
        ):
            if getattr(self, name) not in choices:
                raise InputError(
                    f"{_NAME}: {name} must be one of {', '.join(choices)}, found {getattr(self, name)!r}"
                )
        _recipe(self.recipe)

    def craft(
        self,
        goal: Goal,
        training_set: TrainingSet,
        *,
        budget: Budget,
        surrogate: nn.Module | Sequence[nn.Module] | None = None,
        seed: int,
    ) -> PoisonSet:
        """Poisons crafted against one surrogate or several, on the device where they lie.

        Raises:
            InputError: the goal is not a backdoor, there is no surrogate, no example of the source class, the
                budget is more than the target class has, or a surrogate cannot be trained anew.
            TrainingDivergedError: a retraining did.
        """
        backdoor = as_backdoor(_NAME, goal)
        own, words = targets(backdoor, training_set)
        chosen(_NAME, training_set, own, budget, of=words, seed=seed)  # asks whether the budget fits
        models = networks(_NAME, surrogate)
        device = device_of(models[0], training_set.device)
        patched = self._patched(backdoor, training_set, seed).to(device)
        indices = self._choice(models, training_set, own, budget.count_in(len(training_set)), seed)
        poisons = training_set.subset(indices).to(device)
        descent = SignedDescent(
            poisons.images,
            torch.randn(poisons.images.shape, generator=generator(seed, _NAME, "start")),
            spread=training_set.channel_statistics[1],
            eps=self.eps,
            rate=self.step_size / len(models),
            steps=self.steps,
        )
        losses: list[float] = []
        # The first steps of each stretch but the first follow a retraining.
        stretches = [
            round(self.steps * part / (self.retrainings + 1)) for part in range(self.retrainings + 2)
        ]
        for stretch in range(self.retrainings + 1):
            if stretch:
                poisoned = training_set.with_examples(indices, descent.rounded(), poisons.labels)
                models = self._retrained(models, poisoned, derive_seed(seed, _NAME, "retraining", stretch))
            with contextlib.ExitStack() as stack:
                for model in models:
                    stack.enter_context(preserved(model))
                wanted = [self._wanted(model, patched, backdoor.target) for model in models]
                alignment = Alignment(models, wanted, micro_batch=self.micro_batch)
                for step in range(stretches[stretch], stretches[stretch + 1]):
                    view = view_of_step(
                        self.augmentation,
                        shift=self.shift,
                        flip=self.flip,
                        seed=derive_seed(seed, _NAME, "view", step),
                    )
                    loss, slope = alignment.differentiate(descent.images, poisons.labels, view)
                    losses.append(loss)
                    descent.move(slope)
        return PoisonSet.of(
            training_set,
            indices=indices,
            images=descent.rounded(),
            given_labels=poisons.labels,
            goal=backdoor,
            attack=_NAME,
            configuration={
                **self._options(),
                "budget": budget.to_json(),
                "surrogates": len(models),
                "losses": losses,
            },
            seed=seed,
        )

    def _options(self) -> dict[str, Any]:
        options = {one.name: getattr(self, one.name) for one in fields(self)}
        return {**options, "recipe": _recipe(self.recipe).to_dict()}

    def _patched(self, goal: Backdoor, training_set: TrainingSet, seed: int) -> Tensor:
        """UInt8[m c h w]: training images of the source class with the trigger."""
        pool, words = sources(goal, training_set)
        if not len(pool):
            raise InputError(f"{_NAME}: {training_set.name} has no example of {words} to put the trigger on")
        order = torch.randperm(len(pool), generator=generator(seed, _NAME, "sources"))[: self.sources]
        return goal.trigger.stamp(training_set.subset(pool.cpu()[order]).images)

    def _choice(
        self, models: Sequence[nn.Module], training_set: TrainingSet, own: Tensor, count: int, seed: int
    ) -> Tensor:
        """Int64[count], ascending, on the CPU: the examples of the target class to perturb."""
        order = torch.randperm(len(own), generator=generator(seed, _NAME, "candidates"))
        if self.choice == "random":
            return own.cpu()[order[:count]].sort().values
        pool = own.cpu()[order[: max(count, self.candidates)]].sort().values
        examples = training_set.subset(pool)
        norms = torch.zeros(len(pool))
        for model in models:
            with preserved(model):
                norms += gradient_norms(model, examples, batch=self.norm_batch).cpu()
        return pool[norms.topk(count).indices].sort().values

    def _wanted(self, model: nn.Module, patched: Tensor, target: int) -> Gradient:
        """The gradient of the mean loss of the patched images under the target's label."""
        total: list[Tensor] | None = None
        for part in torch.split(patched, self.micro_batch):
            with torch.enable_grad():
                logits = model(part.float().div(255))
                labels = torch.full((len(part),), target, device=logits.device)
                loss = F.cross_entropy(logits, labels, reduction="sum") / len(patched)
                slope = gradient_of(model, loss)
            total = (
                list(slope) if total is None else [one + two for one, two in zip(total, slope, strict=True)]
            )
        assert total is not None
        return tuple(total)

    def _retrained(
        self, models: Sequence[nn.Module], poisoned: TrainingSet, seed: int
    ) -> tuple[nn.Module, ...]:
        """The same architectures, trained from new parameters on the poisoned set."""
        with torch.enable_grad():
            return tuple(
                train(
                    poisoned,
                    _recipe(self.recipe),
                    seed=derive_seed(seed, number),
                    model=reborn(model, poisoned, seed=derive_seed(seed, number, "parameters")),
                    device=device_of(model, poisoned.device),
                ).model
                for number, model in enumerate(models)
            )


def _recipe(recipe: Recipe | str) -> Recipe:
    return Recipe.preset(recipe) if isinstance(recipe, str) else recipe


def gradient_norms(model: nn.Module, examples: TrainingSet, *, batch: int = 16) -> Tensor:
    """Float[n]: the length of the gradient of each example's loss by all trained parameters of the model.

    Arguments:
        model: in eval mode, so that examples do not touch each other.
        examples: on any device.
        batch: how many gradients are held at a time.
    """
    trained_parameters(model)  # asks whether there are any
    trained = {name: one.detach() for name, one in model.named_parameters() if one.requires_grad}
    rest = {name: one.detach() for name, one in model.named_parameters() if not one.requires_grad}
    rest |= {name: one.detach() for name, one in model.named_buffers()}
    device = device_of(model, examples.device)

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, {**rest, **parameters}, (image[None],))
        return F.cross_entropy(logits, label[None])

    slopes = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), randomness="different")
    norms = []
    for start in range(0, len(examples), batch):
        images, labels = examples.batch(start, start + batch)
        found = slopes(trained, images.to(device), labels.to(device))
        squares = [slope.flatten(1).square().sum(1) for slope in found.values()]
        norms.append(torch.stack(squares).sum(0).sqrt())
    return torch.cat(norms)
