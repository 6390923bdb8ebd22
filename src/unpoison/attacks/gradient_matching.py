"""Gradient matching (Witches' Brew): poisons whose training gradient is the adversary's gradient.

Geiping, Fowl, Huang, Czaja, Taylor, Moeller and Goldstein 2021, "Witches' Brew: Industrial Scale Data
Poisoning via Gradient Matching" (ICLR, arXiv 2009.02276), section 3 and algorithm 1.

Stages: compute on each surrogate the gradient `g_t` of the adversary's loss on the target images; pick the
poisons; from random perturbations within eps, descend `1 - cos(g_t, g_p)` by signed Adam, each step on a
freshly augmented copy of the poisons; begin anew a few times and keep the best; round to 8 bits. A victim
that later descends the loss of the poisons then descends the adversary's as well, without a wrong label in
the set.

Cost: restarts x steps x surrogates x (a training step with a double backward pass on all poisons); see
`_alignment` for memory, which `micro_batch` bounds.

Departures: the restart that is kept is the one whose rounded poisons have the lowest loss without
augmentation, where the public code compares the noisy loss of the last step; a victim is asked in neither.
Parameters that a surrogate does not train (`requires_grad` False) are left out of the match, which makes the
attack one on fine-tuning or on a linear head. Dropout is off (the public code leaves it on).

Limits: the surrogate must be trained as the victim will be. Poisons for one architecture reach another less
often (45, 25 and 8 % in the poisoning benchmark), and victims that do not fit their training set hardly ever.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from unpoison._seeds import derive_seed, generator
from unpoison.attacks._alignment import Alignment, Gradient, gradient_of
from unpoison.attacks._attack import Attack
from unpoison.attacks._feature_space import as_targeted
from unpoison.attacks._methods import register
from unpoison.attacks._signed_descent import Augmentation, SignedDescent, view_of_step
from unpoison.attacks._stamping import device_of, networks
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.models import preserved
from unpoison.registry import Presets
from unpoison.threats import Budget, Goal, PoisonSet, TargetedMisclassification

_NAME = "gradient-matching"


@final
@register(
    name="gradient-matching",
    title="Gradient matching (Witches' Brew)",
    summary="Bends rightly labelled images until training on them descends the adversary's loss.",
    paper="Geiping et al. 2021, ICLR, arXiv 2009.02276",
    cost="restarts x steps x (a training step and a double backward pass over the poisons)",
    presets=("published",),
    labels="clean",
    goals=("targeted-misclassification",),
    knowledge="the training set, and networks trained as the victim will be",
    surrogates=1,
    accepts_surrogates=True,
)
@dataclass(frozen=True, kw_only=True)
class GradientMatching(Attack):
    """The clean-label attack by gradient matching.

    Arguments:
        eps: the largest change of any pixel value, in 1/255.
        steps: of signed Adam, for each restart.
        restarts: how often to begin anew.
        step_size: of Adam, in standard deviations of each channel's pixels, as published (the public code
            perturbs standardised images); divided by the number of surrogates; a tenth after 3/8, 5/8 and 7/8
            of the steps.
        poisons_from: "target" draws poisons among the examples of the class that the target images are to be
            taken for; "third-party" from one other class, drawn at random; "anywhere" from the whole set
            (the published names are single class, third party and random subset).
        bases: draw poisons from these examples instead, in this order.
        augmentation: what every poison goes through at every step. "translate" is as published: a flip, and a
            shift by fractions of a pixel over black; "crop" is what `Recipe` does to the victim's images: a
            flip and a reflected crop by whole pixels; "none".
        shift: the largest shift in pixels.
        flip: mirror half of the images.
        target_loss: what `g_t` is the gradient of: "cross-entropy" towards the label wanted, or
            "carlini-wagner", the margin that is missing to it.
        micro_batch: poisons that go through a network at a time; 64 suit a processor, a GPU takes
            more. The result does not depend on it but for rounding.
        held: of how many poisons the graphs are held in memory together; more of them take two passes and a
            third more time.
        together: restarts that are crafted at once; None is one on a processor and all of them on a GPU.
            The result does not depend on it but for rounding.

    Raises:
        InputError: a value is out of its range.
    """

    PRESETS: ClassVar[Presets] = {
        "published": {},
    }

    eps: float = 16.0
    steps: int = 250
    restarts: int = 8
    step_size: float = 0.1
    poisons_from: Literal["target", "third-party", "anywhere"] = "target"
    bases: tuple[int, ...] = ()
    augmentation: Augmentation = "translate"
    shift: int = 4
    flip: bool = True
    target_loss: Literal["cross-entropy", "carlini-wagner"] = "cross-entropy"
    micro_batch: int = 64
    held: int = 512
    together: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("restarts", 1), ("micro_batch", 1), ("held", 0), ("shift", 0)):
            if getattr(self, name) < least:
                raise InputError(
                    f"gradient-matching: {name} must be at least {least}, found {getattr(self, name)}"
                )
        if self.together is not None and self.together < 1:
            raise InputError(f"gradient-matching: together must be at least 1, found {self.together}")
        if not 0 < self.eps <= 255:
            raise InputError(f"gradient-matching: eps {self.eps} is outside (0, 255]; it is in 1/255")
        if not 0 < self.step_size < math.inf:
            raise InputError(f"gradient-matching: step_size {self.step_size} must be above 0")
        for name, choices in (
            ("poisons_from", ("target", "third-party", "anywhere")),
            ("augmentation", ("translate", "crop", "none")),
            ("target_loss", ("cross-entropy", "carlini-wagner")),
        ):
            if getattr(self, name) not in choices:
                raise InputError(
                    f"gradient-matching: {name} must be one of {', '.join(choices)}, "
                    f"found {getattr(self, name)!r}"
                )
        object.__setattr__(self, "bases", tuple(self.bases))

    def craft(
        self,
        goal: Goal,
        training_set: TrainingSet,
        *,
        budget: Budget,
        surrogate: nn.Module | Sequence[nn.Module] | None = None,
        seed: int,
    ) -> PoisonSet:
        """Poisons crafted against one surrogate or several (an ensemble), on the device where they lie.

        Raises:
            InputError: the goal is not a targeted misclassification, there is no surrogate, the budget is
                more than there are examples to draw from, or the target images do not fit.
        """
        goal = as_targeted(_NAME, goal, training_set)
        models = networks(_NAME, surrogate)
        indices = self._poisons(goal, training_set, budget.count_in(len(training_set)), seed)
        chosen = training_set.subset(indices)
        device = device_of(models[0], training_set.device)
        bases, labels = chosen.images.to(device), chosen.labels.to(device)
        spread = training_set.channel_statistics[1]
        with contextlib.ExitStack() as stack:
            for network in models:
                stack.enter_context(preserved(network))
            wanted = [self._wanted(network, goal, device) for network in models]
            alignment = Alignment(models, wanted, micro_batch=self.micro_batch, held=self.held)
            best, history = None, []
            seeds = [derive_seed(seed, "restart", restart) for restart in range(self.restarts)]
            together = self._at_once(device)
            for start in range(0, self.restarts, together):
                for images, losses in self._descend(
                    alignment, bases, labels, spread, seeds[start : start + together]
                ):
                    final_loss = alignment.loss(images.float().div(255), labels)
                    history.append({"losses": losses, "final": final_loss})
                    if best is None or final_loss < best[0]:
                        best = (final_loss, images)
        assert best is not None
        return PoisonSet.of(
            training_set,
            indices=indices,
            images=best[1],
            given_labels=chosen.labels,
            goal=goal,
            attack=_NAME,
            configuration={
                **asdict(self),
                "budget": budget.to_json(),
                "surrogates": len(models),
                "history": history,
            },
            seed=seed,
        )

    def _at_once(self, device: torch.device) -> int:
        if self.together is not None:
            return self.together
        return 1 if device.type == "cpu" else self.restarts

    def _descend(
        self,
        alignment: Alignment,
        bases: Tensor,
        labels: Tensor,
        spread: Sequence[float],
        seeds: Sequence[int],
    ) -> list[tuple[Tensor, list[float]]]:
        """A few restarts: the rounded poisons UInt8[n c h w] of each, and its loss at every step."""
        start = torch.stack([torch.randn(bases.shape, generator=generator(seed, "start")) for seed in seeds])
        rate = self.step_size / len(alignment.networks)
        descent = SignedDescent(bases, start, spread=spread, eps=self.eps, rate=rate, steps=self.steps)
        losses = []
        for step in range(self.steps):
            views = [
                view_of_step(
                    self.augmentation,
                    shift=self.shift,
                    flip=self.flip,
                    seed=derive_seed(seed, "view", step),
                )
                for seed in seeds
            ]
            found, slope = alignment.differentiate_together(descent.images, labels, views)
            losses.append(found)
            descent.move(slope)
        # Copies, so that the one that will be kept does not keep the others in memory.
        return [
            (images.clone(), list(history))
            for images, history in zip(descent.rounded(), zip(*losses, strict=True), strict=True)
        ]

    def _wanted(self, network: nn.Module, goal: TargetedMisclassification, device: torch.device) -> Gradient:
        with torch.enable_grad():
            logits = network(goal.images.to(device).float().div(255))
            if self.target_loss == "cross-entropy":
                loss = goal.loss(logits)
            else:
                others = logits.clone()
                others[:, goal.target] = -math.inf
                loss = (others.amax(1) - logits[:, goal.target]).clamp(min=0).mean()
            return gradient_of(network, loss)

    def _poisons(
        self, goal: TargetedMisclassification, training_set: TrainingSet, count: int, seed: int
    ) -> Tensor:
        """Int64[count], ascending: the examples to perturb."""
        draws = generator(seed, "gradient-matching", "poisons")
        labels = training_set.labels.cpu()
        if self.bases:
            pool, what = torch.tensor(self.bases), "the bases given"
            if int(pool.min()) < 0 or int(pool.max()) >= len(labels):
                raise InputError(
                    f"gradient-matching: bases must lie in 0..{len(labels) - 1}, "
                    f"found {int(pool.min())}..{int(pool.max())}"
                )
            pool = torch.tensor(list(dict.fromkeys(self.bases)))[:count]
        elif self.poisons_from == "anywhere":
            pool, what = torch.arange(len(labels)), training_set.name
        else:
            label = goal.target
            if self.poisons_from == "third-party":
                others = [
                    one
                    for one in range(training_set.num_classes)
                    if one not in (goal.target, goal.true_label) and bool((labels == one).any())
                ]
                if not others:
                    raise InputError(
                        f"gradient-matching: {training_set.name} has no third class to take poisons from"
                    )
                label = others[int(torch.randint(len(others), (1,), generator=draws))]
            pool, what = (labels == label).nonzero().reshape(-1), f"class {training_set.class_names[label]!r}"
        if count > len(pool):
            raise InputError(
                f"gradient-matching: a budget of {count} is more than the {len(pool)} examples of {what}; "
                f"at most a share of {len(pool) / len(labels):.4g} fits"
            )
        return pool[torch.randperm(len(pool), generator=draws)[:count]].sort().values
