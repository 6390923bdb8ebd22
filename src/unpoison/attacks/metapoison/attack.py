"""MetaPoison: learn which changes of a few training images make a victim learn what the adversary wants.

Huang, Geiping, Fowl, Taylor and Goldstein 2020, "MetaPoison: Practical General-purpose Clean-label Data
Poisoning" (NeurIPS 2020, arXiv 2004.00225).

The adversary wants poisons X_p, n training images that are changed within a `Perturbation` and keep their
correct labels, such that a network trained on them misclassifies a given target image. This is a bilevel
problem whose inner problem is all of training. Algorithm 1 (see `algorithm.py`) instead unrolls K steps of
training, at many points of many trainings: M surrogates at staggered epochs.

A victim is trained from its own initialisation on the poisoned set, `train(poison.apply(clean), recipe,
seed=...)`; the attack never uses one.

Cost of a craft step: M epochs of training, and for each network one look-ahead for every batch with poisons:
K + 1 forward and 2 K backward passes and a second derivative, on one CPU core about 4 + 4 K training steps.
Spread over random batches, n poisons in N images with batches of b touch nearly min(n, N / b) batches;
`poisons_per_batch=p` gathers them in n / p. Before the first step, M T / 2 epochs ("separate") or T
("shared"). Memory: the graphs of a look-ahead for `vmap_size` networks; the surrogates' parameters; four
times the poisons in float32.

Departures from the public code: pixels are clipped in every step and rounded at the end; the ordinary
training steps do not have the target in their batch, so that one ensemble serves any number of goals
(`craft_together`); the warm-up rises within an epoch, not in steps of one; colours beyond the grid are
offset, not moved onto it; the penalty of the colour grid is summed over the poisons, so that it does not
depend on how many share a batch.

Limits: the adversary must know the victim's architecture and training approximately. Success is random:
measure several victims, beside one trained on clean data, and for targets which that one classifies
correctly.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from unpoison._option_checks import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from unpoison._progress import Progress
from unpoison.attacks._attack import Attack, CraftRequest, as_networks
from unpoison.attacks._methods import register
from unpoison.attacks._networks import recipe_of
from unpoison.attacks.metapoison.algorithm import craft_poisons
from unpoison.attacks.metapoison.presets import FINE_TUNING, PLAIN_SGD, PUBLISHED
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.registry import Presets
from unpoison.threats import Budget, Goal, LInf, Perturbation, PoisonSet
from unpoison.training import Recipe


@final
@register(
    name="metapoison",
    title="MetaPoison",
    summary="Learns changes of correctly labelled images through unrolled steps of training.",
    paper="Huang, Geiping, Fowl, Taylor and Goldstein 2020, NeurIPS, arXiv 2004.00225",
    cost="hundreds of epochs of training, and second derivatives wherever there are poisons",
    presets=("small", "sample", "published", "quick-start", "fine-tuning"),
    labels="clean",
    goals=("self-concealment", "targeted-misclassification"),
    knowledge="the training set, and the victim's architecture and training approximately",
    accepts_surrogates=True,
    resumes=True,
)
@dataclass(frozen=True, kw_only=True)
class MetaPoison(Attack):
    """Clean-label poisons for targeted misclassification and self-concealment, learned through training.

    The presets:

    - "small": ours for 5,000 images on one CPU core: 8 surrogates, poisons gathered in few batches, signed
      steps;
    - "sample": "small" for the bundled sample and its training recipe;
    - "published": from scratch, 24 surrogates, 61 steps, colour grid and eps 8 (the paper's figure 4);
    - "quick-start": the same; the paper gives it 5,000 images of CIFAR-10 and 50 poisons;
    - "fine-tuning": of a pretrained ConvNet, K = 4, 101 steps, no colour (the paper's figure 3).

    Every goal of the paper has its options: `start="pretrained"` with a surrogate for fine-tuning,
    `poison_classes` for poisons of a third class or of several, a goal with several images for several
    targets, `SelfConcealment` for self-concealment. The history of the losses is kept in the configuration of
    the poison set, under "history".

    Arguments:
        surrogates: M, networks in the ensemble.
        lifetime: T, the epochs after which a surrogate restarts; at most the recipe's.
        steps: C, craft steps, each of which is an epoch of every surrogate.
        unroll: K, SGD steps of a look-ahead; 2 from scratch and 4 for fine-tuning as published.
        loss_steps: the adversarial loss is averaged over theta_1 .. theta_K ("all", as in the public code) or
            taken at theta_K ("last", as in algorithm 1).
        objective: "carlini-wagner", the goal's margin; "carlini-wagner-zeroed", the public code's form of it,
            in which zero competes with the unwanted logits; "cross-entropy", the goal's own loss.
        confidence: the margin is not driven below minus this; 0 or more.
        trajectory: surrogates train on "clean" data, as in the public code, or on the "poisoned" set, as a
            victim does: much better for a third class, but each goal needs its own ensemble.
        target_in_batch: the targets share the batch statistics of every unrolled step, as in the public code;
            otherwise the surrogates classify them in evaluation mode, as a victim will.
        poisons_per_batch: poisons in each batch that has any, with these batches spread evenly over the
            epoch; 0 leaves poisons in their random batches, as published.
        poison_classes: the classes whose images are changed, by name or number; empty for the goal's own: the
            target class, or the true class for self-concealment. Any other is a third class.
        selection: the "first" images of the classes in turn, as published, or "random" ones.
        watermark: opacity in [0, 1) of the target over the poisons before they are perturbed, 0.3 in some of
            the fine-tuning experiments.
        perturbation: which changes are allowed; also as plain values, see `Perturbation.of`.
        optimizer: "adam" or "signed" (see `rate`).
        rate: of the outer optimiser, above 0; for "adam" in the units of the variables (200 as published),
            for "signed" as a part of their bounds.
        warmup: steps over which the rate rises quadratically; 0 for none.
        drop_every: steps after which the rate is multiplied by `drop_factor`, repeatedly; 0 for never.
        drop_factor: in (0, 1].
        recipe: how surrogates are trained (in float32), also as its fields or the name of a preset; its model
            is used if no surrogate is given.
        start: surrogates start from "scratch", or from the given network's parameters ("pretrained", for
            fine-tuning).
        pretraining: the ensemble is staggered by "separate" trainings, as published, or as checkpoints of one
            "shared" training, which is M / 2 times cheaper. Until their first restart all are then the same
            network at different epochs, and from scratch poisons first fit that one.
        vmap_size: surrogates in one `vmap`, which bounds the memory; more than 1 pays on a GPU alone.
        patience: stop if the mean loss of so many steps is not below that of as many before; 0 for never.

    Raises:
        InputError: an option is out of range.

    >>> from unpoison import attacks
    >>> attacks.get("metapoison", preset="published", steps=10).surrogates
    24
    """

    PRESETS: ClassVar[Presets] = {
        "small": {},
        "sample": {"lifetime": 15, "recipe": Recipe.preset("sample")},
        "published": PUBLISHED,
        "quick-start": PUBLISHED,
        "fine-tuning": FINE_TUNING,
    }

    surrogates: PositiveInt = 8
    lifetime: PositiveInt = 16
    steps: PositiveInt = 30
    unroll: PositiveInt = 2
    loss_steps: Literal["all", "last"] = "all"
    objective: Literal["carlini-wagner-zeroed", "carlini-wagner", "cross-entropy"] = "carlini-wagner"
    confidence: NonNegativeFloat = 100.0
    trajectory: Literal["clean", "poisoned"] = "clean"
    target_in_batch: bool = True
    poisons_per_batch: NonNegativeInt = 12
    poison_classes: tuple[int | str, ...] = ()
    selection: Literal["first", "random"] = "random"
    watermark: Annotated[float, "[0, 1)"] = 0.0
    perturbation: Perturbation = LInf(8)  # noqa: RUF009  (a frozen value)
    optimizer: Literal["adam", "signed"] = "signed"
    rate: PositiveFloat = 0.5
    warmup: NonNegativeInt = 0
    drop_every: NonNegativeInt = 10
    drop_factor: Annotated[float, "(0, 1]"] = 0.5
    recipe: Recipe = replace(PLAIN_SGD, epochs=20, warmup_epochs=2)  # noqa: RUF009  (a frozen value)
    start: Literal["scratch", "pretrained"] = "scratch"
    pretraining: Literal["separate", "shared"] = "separate"
    vmap_size: PositiveInt = 1
    patience: NonNegativeInt = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "recipe", recipe_of(self.recipe))
        object.__setattr__(self, "perturbation", Perturbation.of(self.perturbation))
        super().__post_init__()
        if self.lifetime > self.recipe.epochs:
            raise InputError(
                f"metapoison: lifetime {self.lifetime} is more than the recipe's {self.recipe.epochs} epochs"
            )

    def poison(self, request: CraftRequest) -> PoisonSet:
        """The poisons for one goal.

        Surrogates give the architecture of the ensemble (with `start="pretrained"` their parameters too), and
        are used in turn; without any the recipe's model is used. After each step the state is kept in
        `checkpoints`, and then `progress` is called.

        Raises:
            InputError: there is no surrogate to start from, or the budget is more than the poisoned classes
                have.
            MismatchError: the checkpoints belong to another call.
            TrainingDivergedError: a surrogate's loss is no longer finite.
        """
        self._check_start(request)
        return craft_poisons(self, [request])[0]

    def craft_together(
        self,
        goals: Sequence[Goal],
        training_set: TrainingSet,
        *,
        budget: Budget,
        surrogate: nn.Module | Sequence[nn.Module] | None = None,
        seed: int,
        checkpoints: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
    ) -> tuple[PoisonSet, ...]:
        """The poisons for each of several goals on one ensemble; each is what `craft` would give.

        Surrogates on a clean trajectory do not depend on the poisons, so they are trained once. (Networks
        with dropout draw differently for several goals than for one.) Metrics of `progress` are means over
        the goals.

        Raises:
            InputError: there is no goal, or there are several and the trajectory is poisoned; otherwise as
                `craft`.
        """
        if not goals:
            raise InputError("metapoison: craft_together needs at least one goal")
        if self.trajectory == "poisoned" and len(goals) > 1:
            raise InputError(
                "metapoison: goals share an ensemble only on a clean trajectory; craft them one after another"
            )
        first = CraftRequest(
            attack=self,
            goal=goals[0],
            training_set=training_set,
            budget=budget,
            surrogates=as_networks(surrogate),
            seed=seed,
            checkpoints=checkpoints,
            progress=progress,
        )
        requests = [replace(first, goal=goal) for goal in goals]
        self._check_start(requests[0])
        return tuple(craft_poisons(self, requests))

    def rate_at(self, step: int) -> float:
        """The rate of the outer optimiser at craft step `step`.

        >>> from unpoison import attacks
        >>> published = attacks.get("metapoison", preset="published")
        >>> [round(published.rate_at(step), 4) for step in (0, 4, 19, 20, 40)]
        [8.0, 200.0, 200.0, 20.0, 2.0]
        """
        rate = float(self.rate)
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

    def _check_start(self, request: CraftRequest) -> None:
        if self.start == "pretrained" and not request.surrogates:
            raise InputError(
                'metapoison: start="pretrained" needs a surrogate, the network that victims start from'
            )
