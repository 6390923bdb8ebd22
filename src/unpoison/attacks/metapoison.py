"""MetaPoison: learn which changes of a few training images make a victim learn what the adversary wants.

Huang, Geiping, Fowl, Taylor and Goldstein 2020, "MetaPoison: Practical General-purpose Clean-label Data
Poisoning" (NeurIPS 2020, arXiv 2004.00225).

The adversary wants poisons X_p, n training images changed within a `Perturbation` and rightly labelled, such
that a network trained on them takes his target for what he likes: a bilevel problem, whose inner one is all
of training. Algorithm 1 looks only K steps ahead, but from many points of many trainings:

    stage                                                           here
    1  stagger: train M surrogates, network m to epoch m T / M       _surrogates.ensemble
    2  for each craft step, for each network:
    3    for each batch with poisons: copy the weights, take K       _unrolled.look_ahead
         SGD steps, note the adversarial loss on the target
    4    train the network for one epoch; if it is past epoch T,     _surrogates.Surrogates
         let it start again
    5    average the gradients in the poisons over the networks,     _outer_optimizer, `Perturbation.project`
         move the poisons, project them
    6  round to 8 bits                                               `Perturbation.rounded`

A victim is then trained from its own initialisation on the poisoned set, `training.train(poison.apply(clean),
recipe, seed=...)`; nothing here sees it.

Cost of a craft step: M epochs of training, and for each network one look ahead for every batch that holds
poisons: K + 1 forward and 2 K backward passes and a second derivative, on one CPU core about 4 + 4 K training
steps. Spread over random batches, n poisons in N images with batches of b touch nearly min(n, N / b) batches;
`concentrate=p` gathers them in n / p. Before the first step, M T / 2 epochs ("separate") or T ("shared").
Memory: the graphs of a look ahead for `together` networks; the surrogates' parameters; four times the poisons
in float32.

Departures from the public code: pixels are clipped in every step and rounded at the end; the ordinary
training steps do not have the target in their batch, so that one ensemble serves any number of goals
(`craft_together`); warm-up rises within an epoch, not in steps of one; colours beyond the grid are offset,
not pulled onto it; the penalty of the colour grid is summed over the poisons, so that it does not depend on
how many share a batch.

Limits: the adversary must know the victim's architecture and training roughly. A victim's success is chance:
measure several, beside a victim trained on clean data, and for targets which that one gets right.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Final, Literal, Self, cast, final

import torch
from torch import Tensor, nn

from unpoison._artefacts import canonical_json, digest
from unpoison._checkpoints import CRAFTING, Checkpoint, Checkpoints
from unpoison._global_randomness import own_randomness
from unpoison._seeds import derive_seed, generator
from unpoison.attacks._attack import Attack
from unpoison.attacks._methods import register
from unpoison.attacks._outer_optimizer import OuterOptimizer
from unpoison.attacks._surrogates import Epoch, Surrogates, Upbringing, ensemble
from unpoison.attacks._unrolled import look_ahead
from unpoison.data import TrainingSet
from unpoison.errors import InputError, TrainingDivergedError
from unpoison.registry import Presets
from unpoison.threats import (
    Budget,
    ColorGrid,
    Goal,
    LInf,
    Perturbation,
    PoisonSet,
    SelfConcealment,
    TargetedMisclassification,
)
from unpoison.training import Recipe

Objective = Literal["carlini-wagner-zeroed", "carlini-wagner", "cross-entropy"]

_CHOICES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "depths": ("all", "last"),
        "objective": ("carlini-wagner-zeroed", "carlini-wagner", "cross-entropy"),
        "trajectory": ("clean", "poisoned"),
        "selection": ("first", "random"),
        "optimizer": ("adam", "signed"),
        "start": ("scratch", "pretrained"),
        "pretraining": ("separate", "shared"),
    }
)
_LEAST: Final[Mapping[str, int]] = MappingProxyType(
    {
        "surrogates": 1,
        "lifetime": 1,
        "steps": 1,
        "unroll": 1,
        "concentrate": 0,
        "warmup": 0,
        "drop_every": 0,
        "together": 1,
        "patience": 0,
    }
)


@final
@dataclass(frozen=True, kw_only=True)
class CraftStep:
    """What one craft step saw, before it moved the poisons.

    Arguments:
        step: counted from 0.
        losses: one number a surrogate, its adversarial loss averaged over the step's looks ahead.
        achieved: the share of looks ahead at whose end the targets were predicted as the adversary wants.
        rate: of the outer optimiser.
    """

    step: int
    losses: tuple[float, ...]
    achieved: float
    rate: float

    @property
    def loss(self) -> float:
        """The mean over the surrogates."""
        return sum(self.losses) / len(self.losses)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**dataclasses.asdict(self), "losses": list(self.losses)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """The way back."""
        return cls(**{**value, "losses": tuple(value["losses"])})


_PUBLISHED: Final[Mapping[str, Any]] = {
    "surrogates": 24,
    "lifetime": 24,
    "steps": 61,
    "unroll": 2,
    "depths": "all",
    "objective": "carlini-wagner-zeroed",
    "confidence": 100,
    "trajectory": "clean",
    "target_in_batch": True,
    "concentrate": 0,
    "selection": "first",
    "perturbation": ColorGrid(eps=0.04, resolution=10, smoothness=1) + LInf(8),
    "optimizer": "adam",
    "rate": 200,
    "warmup": 5,
    "drop_every": 20,
    "drop_factor": 0.1,
    "recipe": Recipe(
        model="convnet-bn",
        epochs=200,
        batch_size=125,
        learning_rate=0.1,
        momentum=0,
        nesterov=False,
        weight_decay=0,
        schedule="multistep",
        milestones=(100, 150),
        warmup_epochs=5,
    ),
    "start": "scratch",
}
_FINE_TUNING: Final[Mapping[str, Any]] = {
    **_PUBLISHED,
    "steps": 101,
    "unroll": 4,
    "perturbation": LInf(8),
    "recipe": Recipe(
        model="convnet",
        epochs=200,
        batch_size=125,
        learning_rate=0.01,
        momentum=0,
        nesterov=False,
        weight_decay=0,
    ),
    "start": "pretrained",
}


@final
@register(
    name="metapoison",
    title="MetaPoison",
    summary="Learns changes of rightly labelled images by looking ahead through steps of training.",
    paper="Huang, Geiping, Fowl, Taylor and Goldstein 2020, NeurIPS, arXiv 2004.00225",
    cost="hundreds of epochs of training, and second derivatives wherever there are poisons",
    presets=("small", "sample", "published", "quick-start", "fine-tuning"),
    labels="clean",
    goals=("self-concealment", "targeted-misclassification"),
    knowledge="the training set, and the victim's architecture and training roughly",
    accepts_surrogates=True,
)
@dataclass(frozen=True, kw_only=True)
class MetaPoison(Attack):
    """Clean-label poisons for targeted misclassification and self-concealment, learned through training.

    The presets are

    - "published": from scratch, 24 surrogates, 61 steps, colour grid and eps 8 (the paper's figure 4);
    - "quick-start": the same; the paper gives it 5,000 images of CIFAR-10 and 50 poisons;
    - "fine-tuning": of a pretrained ConvNet, K = 4, 101 steps, no colour (the paper's figure 3);
    - "small": ours for 5,000 images on one CPU core: 8 surrogates, concentrated poisons, signed steps;
    - "sample": "small" for the bundled sample and its training recipe.

    The
    history of the losses is kept in the poison set's configuration, under "history".

    Arguments:
        surrogates: M, networks in the ensemble.
        lifetime: T, the epochs after which a surrogate starts again; at most the recipe's.
        steps: craft steps, each of which is an epoch of every surrogate.
        unroll: K, SGD steps of a look ahead; 2 from scratch and 4 for fine-tuning as published.
        depths: the adversarial loss is averaged over theta_1 .. theta_K ("all", as the public code does) or
            taken at theta_K ("last", as algorithm 1 says).
        objective: "carlini-wagner", the goal's margin; "carlini-wagner-zeroed", the public code's form of it,
            in which zero is a rival too; "cross-entropy", the goal's own loss.
        confidence: the margin is not driven below minus this.
        trajectory: surrogates train on "clean" data, as the public code does, or on the "poisoned" set, which
            they then know as a victim of their age does: much better for a third class, but each goal needs
            an ensemble of its own.
        target_in_batch: the targets share the batch statistics of every unrolled step, as the public code has
            it; otherwise the surrogates look at them in evaluation mode, as a victim will.
        concentrate: poisons in each batch that has any, the batches spread evenly over the epoch; 0 leaves
            poisons in the random batches where they fall, as published.
        poison_classes: the classes whose images are changed; empty for the goal's own: the target class, or
            the true class for self-concealment. Any other is a third class.
        selection: the "first" images of the classes, which take turns, as published; or "random" ones.
        watermark: opacity in [0, 1) of the target over the poisons before they are perturbed, 0.3 in some of
            the fine-tuning experiments.
        perturbation: which changes are allowed; also as its JSON, or as the eps of `LInf`.
        optimizer: "adam" or "signed" (see `rate`).
        rate: of the outer optimiser; for "adam" in the units of the variables (200 as published), for
            "signed" a part of their bounds.
        warmup: steps over which the rate rises quadratically; 0 for none.
        drop_every: steps after which the rate falls by `drop_factor`, again and again; 0 for never.
        drop_factor: in (0, 1].
        recipe: how surrogates are trained (in float32), also as its fields or the name of a preset; its model
            is used when no surrogate is given.
        start: surrogates start from "scratch", or each life from the given network's parameters
            ("pretrained", for fine-tuning).
        pretraining: how the ensemble reaches its staggered ages: in "separate" trainings, as published, or as
            checkpoints of one "shared" training, which is M / 2 times cheaper. All but one are then the same
            network at different ages until they start again, and from scratch poisons first fit that one.
        together: surrogates worked on at once by `vmap`; bounds the memory. More than 1 pays on a GPU alone.
        patience: stop when the mean loss of so many steps is not below that of as many before; 0 never stops.

    Raises:
        InputError: an option is out of range.

    >>> from unpoison import attacks
    >>> attacks.get("metapoison", preset="published", steps=10).surrogates
    24
    """

    PRESETS: ClassVar[Presets] = {
        "small": {},
        "sample": {"lifetime": 15, "recipe": Recipe.preset("sample")},
        "published": _PUBLISHED,
        "quick-start": _PUBLISHED,
        "fine-tuning": _FINE_TUNING,
    }

    surrogates: int = 8
    lifetime: int = 16
    steps: int = 30
    unroll: int = 2
    depths: Literal["all", "last"] = "all"
    objective: Objective = "carlini-wagner"
    confidence: float = 100.0
    trajectory: Literal["clean", "poisoned"] = "clean"
    target_in_batch: bool = True
    concentrate: int = 12
    poison_classes: tuple[int, ...] = ()
    selection: Literal["first", "random"] = "random"
    watermark: float = 0.0
    perturbation: Perturbation = LInf(8)  # noqa: RUF009  (a frozen value)
    optimizer: Literal["adam", "signed"] = "signed"
    rate: float = 0.5
    warmup: int = 0
    drop_every: int = 10
    drop_factor: float = 0.5
    recipe: Recipe = Recipe(  # noqa: RUF009  (a frozen value)
        model="convnet-bn",
        epochs=20,
        batch_size=125,
        learning_rate=0.1,
        momentum=0,
        nesterov=False,
        weight_decay=0,
        warmup_epochs=2,
    )
    start: Literal["scratch", "pretrained"] = "scratch"
    pretraining: Literal["separate", "shared"] = "separate"
    together: int = 1
    patience: int = 0

    def __post_init__(self) -> None:
        self._read_plain_values()
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(
                    f"metapoison: {name} must be one of {', '.join(choices)}, found {getattr(self, name)!r}"
                )
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(
                    f"metapoison: {name} must be a whole number of at least {least}, found {value!r}"
                )
        for name, fits, range_ in (
            ("confidence", self.confidence >= 0, "0 or more"),
            ("rate", self.rate > 0, "above 0"),
            ("drop_factor", 0 < self.drop_factor <= 1, "in (0, 1]"),
            ("watermark", 0 <= self.watermark < 1, "in [0, 1)"),
        ):
            if not fits:
                raise InputError(f"metapoison: {name} must be {range_}, found {getattr(self, name)!r}")
        if self.lifetime > self.recipe.epochs:
            raise InputError(
                f"metapoison: lifetime {self.lifetime} is more than the recipe's {self.recipe.epochs} epochs"
            )
        object.__setattr__(self, "poison_classes", tuple(self.poison_classes))

    def _read_plain_values(self) -> None:
        """Recipe and perturbation as a file or a command line gives them."""
        recipe, perturbation = cast(Any, self.recipe), cast(Any, self.perturbation)
        if isinstance(recipe, str):
            object.__setattr__(self, "recipe", Recipe.preset(recipe))
        elif isinstance(recipe, Mapping):
            object.__setattr__(self, "recipe", Recipe.from_dict(recipe))
        if isinstance(perturbation, int | float):
            object.__setattr__(self, "perturbation", LInf(perturbation))
        elif isinstance(perturbation, Mapping):
            object.__setattr__(self, "perturbation", Perturbation.from_json(perturbation, {}))

    def craft(
        self,
        goal: Goal,
        training_set: TrainingSet,
        *,
        budget: Budget,
        surrogate: nn.Module | Sequence[nn.Module] | None = None,
        seed: int,
        checkpoints: str | os.PathLike[str] | None = None,
        on_step: Callable[[CraftStep], None] | None = None,
    ) -> PoisonSet:
        """The poisons for one goal.

        Arguments:
            goal: `TargetedMisclassification` or `SelfConcealment`, of one or several images.
            training_set: the clean set; the work is done where it lies.
            budget: how many of its examples are changed.
            surrogate: the architecture of the surrogates (for `start="pretrained"`, their parameters too), or
                several, taken in turn; None takes the recipe's model.
            seed: where all randomness comes from.
            checkpoints: a directory; the state is kept there after each step, and a craft that finds a
                checkpoint of its own there goes on from it to the same result.
            on_step: called after each step, when its checkpoint is stored.

        Raises:
            InputError: a goal that is not served, a budget that does not fit, a damaged checkpoint.
            MismatchError: the checkpoints belong to another craft.
            TrainingDivergedError: a surrogate's loss is no longer finite.
        """

        def tell(steps: Sequence[CraftStep]) -> None:
            if on_step is not None:
                on_step(steps[0])

        return self._craft((goal,), training_set, budget, surrogate, seed, checkpoints, tell)[0]

    def craft_together(
        self,
        goals: Sequence[Goal],
        training_set: TrainingSet,
        *,
        budget: Budget,
        surrogate: nn.Module | Sequence[nn.Module] | None = None,
        seed: int,
        checkpoints: str | os.PathLike[str] | None = None,
        on_step: Callable[[tuple[CraftStep, ...]], None] | None = None,
    ) -> tuple[PoisonSet, ...]:
        """The poisons for each of several goals, which share one ensemble; each is what `craft` would give.

        Surrogates on a clean trajectory do not depend on the poison, so they are trained once. (Networks with
        dropout draw differently for several goals than for one.) `on_step` gets one record a goal; a goal
        whose loss has settled repeats its last.

        Raises:
            InputError: also where the trajectory is poisoned, or there is no goal.
        """
        if not goals:
            raise InputError("metapoison: craft_together needs at least one goal")
        if self.trajectory == "poisoned" and len(goals) > 1:
            raise InputError(
                "metapoison: goals share an ensemble only on a clean trajectory; craft them one after another"
            )
        tell = None if on_step is None else lambda steps: on_step(tuple(steps))
        return tuple(self._craft(goals, training_set, budget, surrogate, seed, checkpoints, tell))

    def _craft(
        self,
        goals: Sequence[Goal],
        training_set: TrainingSet,
        budget: Budget,
        surrogate: nn.Module | Sequence[nn.Module] | None,
        seed: int,
        checkpoints: str | os.PathLike[str] | None,
        on_step: Callable[[Sequence[CraftStep]], None] | None,
    ) -> list[PoisonSet]:
        templates = (surrogate,) if isinstance(surrogate, nn.Module) else tuple(surrogate or ())
        if self.start == "pretrained" and not templates:
            raise InputError('metapoison: start="pretrained" needs a surrogate to start from')
        poisons = [_Poison(self, goal, training_set, budget, seed) for goal in goals]
        store = None
        if checkpoints is not None:
            identity = {
                "configuration": self.configuration(),
                "goal": [_identity(goal) for goal in goals],
                "budget": budget.to_json(),
                "seed": seed,
                "training set": training_set.fingerprint,
                "surrogate": [_fingerprint(template) for template in templates],
            }
            store = Checkpoints(checkpoints, identity, kind=CRAFTING)
        upbringing = Upbringing(
            training_set=training_set,
            templates=templates,
            recipe=self.recipe,
            lifetime=self.lifetime,
            pretrained=self.start == "pretrained",
            seed=seed,
        )
        stacks, done = self._begun(upbringing, poisons, store)
        for step in range(done, self.steps):
            working = [poison for poison in poisons if not poison.settled]
            if not working:
                break
            with _own_randomness(upbringing, f"step {step}"), torch.enable_grad():
                for poison in working:
                    poison.begin()
                for surrogates in stacks:
                    self._epoch(surrogates, working)
                for poison in working:
                    poison.move(step)
            if store is not None:
                store.write(_checkpoint(step + 1, stacks, poisons))
            if on_step is not None:
                on_step([poison.history[-1] for poison in poisons])
        return [poison.finished(training_set, budget, seed) for poison in poisons]

    def _begun(
        self, upbringing: Upbringing, poisons: Sequence[_Poison], store: Checkpoints | None
    ) -> tuple[list[Surrogates], int]:
        """The ensemble, staggered, and how many craft steps are done: from the checkpoint if there is one."""
        checkpoint = None if store is None else store.latest()
        with _own_randomness(upbringing, "pretraining"), torch.enable_grad():
            if checkpoint is None:
                stacks = ensemble(
                    upbringing, self.surrogates, together=self.together, pretraining=self.pretraining
                )
                if store is not None:
                    store.write(_checkpoint(0, stacks, poisons))
                return stacks, 0
            for place, poison in enumerate(poisons):
                poison.restore(place, checkpoint)
            stacks = _ensemble_of(checkpoint, upbringing, self.surrogates, self.together)
            return stacks, checkpoint.done

    def _epoch(self, surrogates: Surrogates, poisons: Sequence[_Poison]) -> None:
        """One epoch of a stack: look ahead wherever there are poisons, then take the ordinary step."""
        epoch = Epoch(surrogates)
        looks = [_Looks(poison, surrogates, epoch) for poison in poisons]
        for batch in range(len(epoch)):
            for look in looks:
                look.ahead(batch)
            if self.trajectory == "poisoned":
                surrogates.train(epoch, batch, looks[0].poisons_where_they_fall(batch))
            else:
                surrogates.train(epoch, batch)
        for look in looks:
            look.conclude()
        surrogates.grow_older()
        surrogates.come_of_age()

    def rate_at(self, step: int) -> float:
        """The rate of the outer optimiser at craft step `step`.

        >>> from unpoison import attacks
        >>> [round(attacks.get("metapoison", preset="published").rate_at(step), 4) for step in (0, 4, 19, 20, 40)]
        [8.0, 200.0, 200.0, 20.0, 2.0]
        """
        rate = self.rate
        if self.warmup:
            rate *= min(((step + 1) / self.warmup) ** 2, 1)
        if self.drop_every:
            rate *= self.drop_factor ** (step // self.drop_every)
        return rate

    def loss(self, goal: Goal, logits: Tensor) -> Tensor:
        """Float[M]: the adversarial loss of logits Float[M m classes] on the goal's m targets."""
        if self.objective == "cross-entropy":
            return torch.stack([goal.loss(rows) for rows in logits])
        margin = goal.margin(logits, zeroed=self.objective == "carlini-wagner-zeroed")
        return margin.clamp(min=-self.confidence).mean(1)

    def configuration(self) -> dict[str, Any]:
        """All options, ready for JSON."""
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            **options,
            "poison_classes": list(self.poison_classes),
            "perturbation": self.perturbation.to_json(),
            "recipe": self.recipe.to_dict(),
        }


@final
class _Poison:
    """The poisons for one goal while they are crafted."""

    def __init__(
        self, attack: MetaPoison, goal: Goal, training_set: TrainingSet, budget: Budget, seed: int
    ) -> None:
        if not isinstance(goal, TargetedMisclassification | SelfConcealment):
            raise InputError(
                f"metapoison: serves the goals 'targeted-misclassification' and 'self-concealment', "
                f"not {goal.kind!r}"
            )
        self.attack, self.goal, self.seed = attack, goal, seed
        device = training_set.device
        self.indices = _chosen(attack, goal, training_set, budget, seed)
        self.labels = training_set.labels[self.indices.to(device)]
        targets = goal.victims(training_set)[0].to(device)
        self.targets = targets.float() / 255
        self.images = training_set.images[self.indices.to(device)]
        if attack.watermark:
            over = targets[torch.arange(len(self.images), device=device) % len(targets)].float()
            mixed = self.images.float().lerp(over, attack.watermark)
            self.images = mixed.round().to(torch.uint8)
        # For each training example its place among the poisons, or -1.
        self.place_of = torch.full((len(training_set),), -1)
        self.place_of[self.indices] = torch.arange(len(self.indices))
        start = generator(seed, "metapoison", "start")
        self.variables = attack.perturbation.initial(self.images, generator=start)
        self.optimizer = OuterOptimizer(attack.optimizer, attack.perturbation.scales())
        self.history: list[CraftStep] = []
        self.begin()

    def begin(self) -> None:
        """Start a craft step: the poisons as the surrogates see them, and no gradient yet."""
        with torch.no_grad():
            self.pixels = self.attack.perturbation.apply(self.images, self.variables)
        self.gradient = torch.zeros_like(self.pixels)
        self.losses: list[Tensor] = []
        self.hits: list[Tensor] = []

    def move(self, step: int) -> None:
        """Average over the ensemble, take the outer step, project."""
        losses = torch.cat(self.losses).tolist()
        if not all(map(math.isfinite, losses)):
            worst = next(place for place, loss in enumerate(losses) if not math.isfinite(loss))
            raise TrainingDivergedError(
                f"metapoison: the adversarial loss of surrogate {worst} is not finite at step {step}; "
                f"lower the recipe's learning rate ({self.attack.recipe.learning_rate:g}) or warm up longer"
            )
        perturbation, rate = self.attack.perturbation, self.attack.rate_at(step)
        leaves = {name: value.detach().requires_grad_() for name, value in self.variables.items()}
        pixels = perturbation.apply(self.images, leaves)
        # The meta-gradient is linear in the pixels' own, so one pass leads it back to the variables.
        total = (pixels * (self.gradient / self.attack.surrogates)).sum() + perturbation.penalty(leaves).sum()
        gradients = torch.autograd.grad(total, list(leaves.values()))
        moved = self.optimizer.step(self.variables, dict(zip(leaves, gradients, strict=True)), rate)
        self.variables = perturbation.project(moved, self.images)
        achieved = float(torch.cat(self.hits).mean())
        self.history.append(CraftStep(step=step, losses=tuple(losses), achieved=achieved, rate=rate))

    @property
    def settled(self) -> bool:
        """Whether the loss has stopped falling."""
        span = self.attack.patience
        if not span or len(self.history) < 2 * span:
            return False
        losses = [step.loss for step in self.history]
        return sum(losses[-span:]) >= sum(losses[-2 * span : -span])

    def state(self, place: int) -> dict[str, Tensor]:
        """The tensors that a checkpoint keeps."""
        variables = {f"poison.{place}.variable.{name}": value for name, value in self.variables.items()}
        moments = {
            f"poison.{place}.optimizer.{name}": value for name, value in self.optimizer.tensors.items()
        }
        return variables | moments

    def restore(self, place: int, checkpoint: Checkpoint) -> None:
        """Take back what `state` gave, and the history."""
        device = self.images.device

        def group(prefix: str) -> dict[str, Tensor]:
            return {
                name.removeprefix(prefix): value.to(device)
                for name, value in checkpoint.tensors.items()
                if name.startswith(prefix)
            }

        self.variables = group(f"poison.{place}.variable.")
        self.optimizer.tensors = group(f"poison.{place}.optimizer.")
        self.history = [CraftStep.from_dict(step) for step in checkpoint.notes["history"][place]]
        self.optimizer.steps = len(self.history)

    def finished(self, training_set: TrainingSet, budget: Budget, seed: int) -> PoisonSet:
        """The poisons as 8-bit images."""
        return PoisonSet.of(
            training_set,
            indices=self.indices,
            images=self.attack.perturbation.rounded(self.images, self.variables),
            given_labels=self.labels,
            goal=self.goal,
            attack="metapoison",
            configuration={
                **self.attack.configuration(),
                "budget": budget.to_json(),
                "history": [step.to_dict() for step in self.history],
            },
            seed=seed,
        )


@final
class _Looks:
    """The looks ahead of one stack in one epoch, for the poisons of one goal."""

    def __init__(self, poison: _Poison, surrogates: Surrogates, epoch: Epoch) -> None:
        self.poison, self.surrogates, self.epoch = poison, surrogates, epoch
        self.attack = poison.attack
        self.draws = epoch.draws("augmentation of looks ahead")
        self.losses: list[Tensor] = []
        self.hits: list[Tensor] = []
        self.gathered = self._gathered() if self.attack.concentrate else {}

    def ahead(self, batch: int) -> None:
        """Look ahead from `batch`, if it holds poisons, and add their gradients to those of the step."""
        for rows, places, members in self._poisoned(batch):
            poison, epoch = self.poison, self.epoch
            ids = members.to(poison.pixels.device)
            pixels = poison.pixels[ids].requires_grad_()
            batches = [epoch.examples(rows, (places, pixels), self.draws)]
            for further in range(1, self.attack.unroll + 1):
                clean = epoch.rows[(batch + further) % len(epoch)]
                batches.append(epoch.examples(clean, None, self.draws))
            found = look_ahead(
                self.surrogates.stack,
                self.surrogates.parameters,
                self.surrogates.buffers,
                self.surrogates.momenta,
                batches,
                poison.targets,
                lambda logits: self.attack.loss(self.poison.goal, logits),
                epoch.step(batch),
                depths=self.attack.depths,
                target_in_batch=self.attack.target_in_batch,
            )
            (gradient,) = torch.autograd.grad(found.loss.sum(), pixels)
            poison.gradient.index_add_(0, ids, gradient)
            self.losses.append(found.loss.detach())
            self.hits.append(poison.goal.achieved(found.logits.argmax(-1)).float())

    def conclude(self) -> None:
        """Hand the stack's losses to the poison."""
        count = len(self.surrogates.numbers)
        self.poison.losses.append(torch.stack(self.losses).view(-1, count).mean(0))
        self.poison.hits.append(torch.stack(self.hits).flatten())

    def poisons_where_they_fall(self, batch: int) -> tuple[Tensor, Tensor] | None:
        """Places among the rows of `batch` and what to put there, for training on the poisoned set."""
        for _, places, members in self._fallen(batch):
            return places, self.poison.pixels[members.to(self.poison.pixels.device)]
        return None

    def _poisoned(self, batch: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Batches with poisons that are due at `batch`.

        Each is the rows Int64[M b] of the training set, the places Int64[q] of poisons among these rows taken
        one after another, and which poisons Int64[q] they are.
        """
        return self.gathered.get(batch, []) if self.attack.concentrate else self._fallen(batch)

    def _fallen(self, batch: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The batch as it is, with poisons in place of their clean originals."""
        rows = self.epoch.rows[batch]
        members = self.poison.place_of[rows].flatten()
        places = (members >= 0).nonzero().squeeze(1)
        return [(rows, places, members[places])] if len(places) else []

    def _gathered(self) -> dict[int, list[tuple[Tensor, Tensor, Tensor]]]:
        """For evenly spaced batches: `concentrate` poisons each, and examples of the batch for the rest."""
        epoch, poison = self.epoch, self.poison
        orders = [
            torch.randperm(len(poison.indices), generator=draws) for draws in epoch.draws("order of poisons")
        ]
        size = min(self.attack.concentrate, epoch.rows[0].shape[1])
        chunks = torch.split(torch.stack(orders), size, 1)
        gathered: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
        for number, members in enumerate(chunks):
            batch = number * len(epoch) // len(chunks)
            rows = epoch.rows[batch]
            # Clean originals of poisons make room first.
            order = (poison.place_of[rows] >= 0).int().sort(dim=1, stable=True).indices
            room = max(rows.shape[1] - members.shape[1], 0)
            rows = torch.cat([poison.indices[members], rows.gather(1, order[:, :room])], 1)
            starts = torch.arange(len(rows)).unsqueeze(1) * rows.shape[1]
            places = (starts + torch.arange(members.shape[1])).flatten()
            gathered.setdefault(batch, []).append((rows, places, members.flatten()))
        return gathered


def _own_randomness(upbringing: Upbringing, part: str) -> contextlib.AbstractContextManager[None]:
    """For dropout and its like: global generators seeded for this part of the craft, given back after it."""
    seed = derive_seed(upbringing.seed, "metapoison", part)
    return own_randomness(upbringing.training_set.device, seed=seed)


def _ensemble_of(
    checkpoint: Checkpoint, upbringing: Upbringing, count: int, together: int
) -> list[Surrogates]:
    """The ensemble that `checkpoint` holds."""
    device = upbringing.training_set.device
    stacks = []
    for first in range(0, count, together):
        stack = Surrogates(upbringing, range(first, min(first + together, count)))
        prefix = f"surrogates.{first}."
        stack.tensors = {name: checkpoint.tensors[prefix + name].to(device) for name in stack.tensors}
        stack.ages, stack.lives = (list(checkpoint.notes[what][str(first)]) for what in ("ages", "lives"))
        stacks.append(stack)
    return stacks


def _checkpoint(steps_done: int, stacks: Sequence[Surrogates], poisons: Sequence[_Poison]) -> Checkpoint:
    tensors = {
        f"surrogates.{stack.numbers[0]}.{name}": value
        for stack in stacks
        for name, value in stack.tensors.items()
    }
    for place, poison in enumerate(poisons):
        tensors |= poison.state(place)
    notes = {
        "ages": {str(stack.numbers[0]): stack.ages for stack in stacks},
        "lives": {str(stack.numbers[0]): stack.lives for stack in stacks},
        "history": [[step.to_dict() for step in poison.history] for poison in poisons],
    }
    return Checkpoint(done=steps_done, tensors=tensors, notes=notes)


def _chosen(attack: MetaPoison, goal: Goal, training_set: TrainingSet, budget: Budget, seed: int) -> Tensor:
    """Int64[n], ascending: the examples to be changed."""
    if isinstance(goal, TargetedMisclassification):
        own, named = goal.target, [goal.target, goal.true_label]
    else:
        own = cast(SelfConcealment, goal).true_label
        named = [own]
    classes = attack.poison_classes or (own,)
    for label in (*classes, *named):
        if not 0 <= label < training_set.num_classes:
            raise InputError(
                f"{training_set.name}: metapoison is to use class {label}, "
                f"but the classes are 0..{training_set.num_classes - 1}"
            )
    count = budget.count_in(len(training_set))
    labels = training_set.labels.cpu()
    members = [(labels == label).nonzero().squeeze(1).tolist() for label in dict.fromkeys(classes)]
    in_turn = [place for row in itertools.zip_longest(*members) for place in row if place is not None]
    if count > len(in_turn):
        names = ", ".join(f"{label} ({training_set.class_names[label]})" for label in classes)
        fits = (
            f"at most {len(in_turn)} fit, a share of {len(in_turn) / len(training_set):.4g}"
            if in_turn
            else "none fits"
        )
        raise InputError(
            f"metapoison: a budget of {budget} ({count} of {len(training_set)}) is more than the "
            f"{len(in_turn)} examples of class {names}; {fits}"
        )
    candidates = torch.tensor(in_turn)
    if attack.selection == "random":
        order = torch.randperm(len(candidates), generator=generator(seed, "metapoison", "poisons"))
        candidates = candidates[order]
    return candidates[:count].sort().values


def _identity(goal: Goal) -> str:
    tensors = goal.tensors()
    return digest(
        canonical_json(goal.to_json()),
        *(tensors[name].cpu().contiguous().numpy().tobytes() for name in sorted(tensors)),
    )


def _fingerprint(template: nn.Module) -> str:
    state = template.state_dict()
    return digest(
        repr(template),
        *(name for name in state),
        *(value.detach().cpu().contiguous().numpy().tobytes() for value in state.values()),
    )
