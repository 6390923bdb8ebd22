"""`Attack`: from a goal, a training set and a budget to a poison set.

An attack implements `poison`. It is given a `CraftRequest`, which holds the arguments of `craft` and does
what attacks have in common: drawing examples, deriving seeds, reporting progress, and building the poison
set.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, cast, final

import torch
from torch import Tensor, nn

from unpoison._memory import check_memory
from unpoison._option_checks import CheckedOptions
from unpoison._progress import Progress
from unpoison._seeds import derive_seed, generator
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.models import activations_of
from unpoison.registry import Method
from unpoison.threats import (
    Backdoor,
    Budget,
    Goal,
    Perturbation,
    PoisonSet,
    TargetedMisclassification,
    Trigger,
    TriggeredGoal,
)
from unpoison.training import Recipe


class Attack(CheckedOptions, ABC):
    """A way to craft poison; its options are the fields of a frozen dataclass.

    The conformance tests hold every attack to this: it uses the whole budget and no more, changes nothing
    that it does not list, gives the labels that its declaration promises and the same poisons for the same
    seed, leaves the training set and the surrogates as they were, and refuses what it cannot do in one line.
    """

    method: ClassVar[Method]

    @final
    def craft(
        self,
        goal: Goal,
        training_set: TrainingSet,
        *,
        budget: Budget,
        surrogate: nn.Module | Sequence[nn.Module] | None = None,
        seed: int,
        checkpoints: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
    ) -> PoisonSet:
        """The poison set for `goal` within `budget` of `training_set`.

        Arguments:
            goal: what the adversary wants.
            training_set: the clean set.
            budget: how many of its examples may be changed; attacks use all of it.
            surrogate: the network or networks to craft on, Float[b c h w] images in [0, 1] in, logits out;
                never changed. Attacks that craft without one ignore it.
            seed: of everything random.
            checkpoints: a directory. An attack that can resume (MetaPoison) keeps its state there and goes on
                from a checkpoint of the same call to the same result; the others ignore it.
            progress: called after every step of attacks that take long, at the stage "craft".

        Raises:
            InputError: the attack does not serve this goal, the goal or the budget does not fit the set,
                there is no surrogate and the attack needs one, or the checkpoints are damaged.
            MismatchError: the checkpoints belong to another call.
            TrainingDivergedError: the loss of a surrogate is no longer finite.
        """
        request = CraftRequest(
            attack=self,
            goal=goal,
            training_set=training_set,
            budget=budget,
            surrogates=as_networks(surrogate),
            seed=seed,
            checkpoints=checkpoints,
            progress=progress,
        )
        check_memory(
            f"craft by {request.name}",
            self.memory_needed(request),
            advice=f"poison fewer than {request.count:,} examples, or give a narrower surrogate",
            device=training_set.device,
        )
        return self.poison(request)

    def memory_needed(self, request: CraftRequest) -> Mapping[str, float]:
        """Bytes by what takes them, beside the training set and the surrogates, when most is taken.

        Here: the poisoned images, as bytes and as floats with two states of an optimiser, and the activations
        of a batch of them, or of other examples; an attack that takes more says so.
        """
        pixels = request.count * math.prod(request.training_set.image_shape)
        parts: dict[str, float] = {"poisoned images": pixels * (2 + 4 * 4)}
        if request.surrogates:
            batch = min(len(request.training_set), self._images_at_once(request.count))
            first = request.training_set.images[:2].float() / 255
            most = max(activations_of(one, first).training(batch) for one in request.surrogates)
            parts["activations"] = self.graphs * most
        return parts

    graphs: ClassVar[int] = 1
    """How many graphs of a batch are held at a time."""

    def _images_at_once(self, count: int) -> int:
        """How many images go through a surrogate at a time; all `count` poisons without such an option."""
        known = (getattr(self, name, None) for name in ("micro_batch", "batch_size"))
        return next((one for one in known if isinstance(one, int)), count)

    @abstractmethod
    def poison(self, request: CraftRequest) -> PoisonSet:
        """The poison set that `craft` returns.

        Arguments:
            request: of a goal that the attack serves and that fits the training set.
        """

    @final
    def configuration(self) -> dict[str, Any]:
        """All options by name, ready for JSON."""
        return {one.name: _plain(getattr(self, one.name)) for one in fields(cast(Any, self))}


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class CraftRequest:
    """The arguments of one call of `Attack.craft`.

    Arguments:
        attack: the attack.
        goal: of a kind that the attack serves; fits the training set.
        training_set: the clean set.
        budget: how many examples to change.
        surrogates: the networks that were given.
        seed: of everything random.
        checkpoints: a directory, or None.
        progress: called after every step, or None.

    Raises:
        InputError: the attack does not serve the goal, or the goal or the budget does not fit.
    """

    attack: Attack
    goal: Goal
    training_set: TrainingSet
    budget: Budget
    surrogates: tuple[nn.Module, ...]
    seed: int
    checkpoints: str | os.PathLike[str] | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if getattr(self.attack, "method", None) is None:
            name = type(self.attack).__name__
            raise InputError(f"{name}: is not registered; declare it with unpoison.attacks.register")
        served = self.attack.method.goals
        if self.goal.kind not in served:
            raise InputError(
                f"{self.name}: serves the goal {' or '.join(map(repr, served))} only, not {self.goal.kind!r}"
            )
        self.goal.check(self.training_set)
        self.budget.count_in(len(self.training_set))

    @property
    def name(self) -> str:
        """Of the attack."""
        return self.attack.method.name

    @property
    def backdoor(self) -> Backdoor:
        """The goal of an attack that serves backdoors alone."""
        return cast(Backdoor, self.goal)

    @property
    def triggered(self) -> TriggeredGoal:
        """The goal of an attack that serves goals with a trigger alone."""
        return cast(TriggeredGoal, self.goal)

    @property
    def targeted(self) -> TargetedMisclassification:
        """The goal of an attack that serves targeted misclassification alone."""
        return cast(TargetedMisclassification, self.goal)

    @property
    def count(self) -> int:
        """How many examples to change."""
        return self.budget.count_in(len(self.training_set))

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """The surrogates, at least one.

        Raises:
            InputError: there is none.
        """
        if not self.surrogates:
            raise InputError(
                f"{self.name}: needs a surrogate, a network trained on the clean set or on one like it; "
                f"give surrogate="
            )
        return self.surrogates

    def generator(self, *names: str | int) -> torch.Generator:
        """A fresh generator for one purpose of this attack, on the CPU."""
        return generator(self.seed, self.name, *names)

    def derived_seed(self, *names: str | int) -> int:
        """A seed for one purpose of this attack."""
        return derive_seed(self.seed, self.name, *names)

    def report(self, done: int, total: int, *, stage: str = "craft", **metrics: float | Tensor) -> None:
        """Report a finished step; tensors are read from their device only if there is a `progress`."""
        if self.progress is not None:
            self.progress(stage, done, total, **{key: float(value) for key, value in metrics.items()})

    def class_examples(self, label: int) -> Tensor:
        """Int64[m], on the CPU: the examples of a class."""
        return (self.training_set.labels == label).nonzero().reshape(-1).cpu()

    def class_in_words(self, label: int) -> str:
        """Number and name of a class."""
        return f"class {label} ({self.training_set.class_names[label]})"

    def source_examples(self) -> Tensor:
        """Int64[m], on the CPU: the examples that the trigger is for.

        Raises:
            InputError: there is none.
        """
        pool = self.triggered.candidates(self.training_set).cpu()
        if not len(pool):
            raise InputError(
                f"{self.name}: {self.training_set.name} has no example of {self._source_in_words()} to put "
                "the trigger on"
            )
        return pool

    def draw_sources(self, *, count: int | None = None) -> Tensor:
        """Int64[k], ascending: as many examples that the trigger is for as the budget allows, or `count`."""
        pool = self.triggered.candidates(self.training_set).cpu()
        return self.draw(pool, self._source_in_words(), count=count)

    def draw_targets(self) -> Tensor:
        """Int64[k], ascending: as many examples of a backdoor's target class as the budget allows."""
        label = self.backdoor.target
        return self.draw(self.class_examples(label), f"the target {self.class_in_words(label)}")

    def draw_bases(self, given: Sequence[int]) -> Tensor:
        """Int64[k], ascending: the first of the bases given, or examples of the goal's target class.

        Raises:
            InputError: there are too few for the budget, or one is outside the set.
        """
        if not given:
            label = self.targeted.target
            words = f"the target {self.class_in_words(label)}"
            return self.draw(self.class_examples(label), words, purpose="bases")
        outside = [index for index in given if not 0 <= index < len(self.training_set)]
        if outside:
            raise InputError(f"{self.name}: base {outside[0]} is outside 0..{len(self.training_set) - 1}")
        return self.draw(torch.tensor(list(dict.fromkeys(given))), "the bases given", shuffle=False)

    def draw(
        self,
        candidates: Tensor,
        of: str,
        *,
        count: int | None = None,
        purpose: str = "poisons",
        draws: torch.Generator | None = None,
        shuffle: bool = True,
    ) -> Tensor:
        """Int64[k], ascending, on the CPU: examples drawn uniformly without replacement.

        Arguments:
            candidates: Int64[m], the examples to draw from, on the CPU.
            of: the class or set that the candidates belong to, for the message.
            count: how many; as many as the budget allows when None.
            purpose: the name of the generator to draw from.
            draws: another generator, in its place.
            shuffle: False takes the first candidates in place of random ones.

        Raises:
            InputError: there are not so many candidates.
        """
        count, room = self.count if count is None else count, len(candidates)
        if count > room:
            total = len(self.training_set)
            fits = f"at most {room} fit, a share of {room / total:.4g}" if room else "none fits"
            raise InputError(
                f"{self.name}: a budget of {self.budget} ({count} of {total}) is more than the {room} "
                f"examples of {of}; {fits}"
            )
        if shuffle:
            draws = self.generator(purpose) if draws is None else draws
            candidates = candidates[torch.randperm(room, generator=draws)]
        return candidates[:count].sort().values

    def with_trigger(self, trigger: Trigger) -> TriggeredGoal:
        """The goal with this trigger; the goal itself if it has it."""
        goal: Any = self.triggered
        changed: TriggeredGoal = goal if trigger is goal.trigger else replace(goal, trigger=trigger)
        return changed

    def relabelled(self, trigger: Trigger) -> PoisonSet:
        """The poison set of a dirty-label backdoor: examples with the trigger, labelled as the goal wants.

        Arguments:
            trigger: used in place of the goal's if it is another; the poison set's goal has it.
        """
        goal, indices = self.with_trigger(trigger), self.draw_sources()
        clean = self.training_set.subset(indices)
        return self.poison_set(
            indices=indices, images=trigger.stamp(clean.images), labels=goal.wanted(clean.labels), goal=goal
        )

    def poison_set(
        self,
        *,
        indices: Tensor,
        images: Tensor,
        labels: Tensor,
        goal: Goal | None = None,
        **more: Any,
    ) -> PoisonSet:
        """The poison set, with the attack's options and the budget in its configuration.

        Arguments:
            indices: Int64[k], the examples that are changed.
            images: UInt8[k c h w], on any device.
            labels: Int64[k], the labels they are given.
            goal: in place of the request's, if the attack has made the trigger.
            **more: further entries of the configuration, ready for JSON.
        """
        surrogates = {"surrogates": len(self.surrogates)} if self.attack.method.surrogates else {}
        return PoisonSet.of(
            self.training_set,
            indices=indices,
            images=images,
            given_labels=labels,
            goal=self.goal if goal is None else goal,
            attack=self.name,
            configuration={
                **self.attack.configuration(),
                "budget": self.budget.to_json(),
                **surrogates,
                **more,
            },
            seed=self.seed,
        )

    def _source_in_words(self) -> str:
        goal = self.triggered
        if not isinstance(goal, Backdoor):
            return goal.source_in_words
        if goal.source is not None:
            return self.class_in_words(goal.source)
        return f"all classes but {self.class_in_words(goal.target).removeprefix('class ')}"


def as_networks(surrogate: nn.Module | Sequence[nn.Module] | None) -> tuple[nn.Module, ...]:
    """The surrogates as `Attack.craft` is given them."""
    return (surrogate,) if isinstance(surrogate, nn.Module) else tuple(surrogate or ())


def _plain(value: Any) -> Any:
    if isinstance(value, Perturbation):
        return value.to_json()
    if isinstance(value, Recipe):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else value
