"""What the attacks in feature space share: where they begin and end, and the features of several networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from unpoison._global_randomness import own_randomness
from unpoison._seeds import derive_seed, generator
from unpoison.attacks._stamping import device_of, last_linear, networks, rounded
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.models import FeatureTap
from unpoison.threats import Budget, Goal, PoisonSet, TargetedMisclassification

Side = Literal["output", "input"]
_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


def as_targeted(attack: str, goal: Goal, training_set: TrainingSet) -> TargetedMisclassification:
    """The goal, which must be about given images of the set's shape and one of its classes.

    Raises:
        InputError: it is not.
    """
    if not isinstance(goal, TargetedMisclassification):
        raise InputError(f"{attack}: serves the goal 'targeted-misclassification' only, not {goal.kind!r}")
    goal.victims(training_set)  # asks whether the shapes match
    if goal.target >= training_set.num_classes:
        raise InputError(
            f"{training_set.name}: the goal names class {goal.target}, "
            f"but the classes are 0..{training_set.num_classes - 1}"
        )
    return goal


def drawn_bases(
    attack: str,
    goal: TargetedMisclassification,
    training_set: TrainingSet,
    given: Sequence[int],
    *,
    budget: Budget,
    seed: int,
) -> Tensor:
    """Int64[k], ascending, on the CPU: the first of the bases given, or examples of the target class.

    Raises:
        InputError: there are too few for the budget, or one is outside the set.
    """
    count = budget.count_in(len(training_set))
    if given:
        outside = [index for index in given if not 0 <= index < len(training_set)]
        if outside:
            raise InputError(f"{attack}: base {outside[0]} is outside 0..{len(training_set) - 1}")
        pool, words = torch.tensor(list(dict.fromkeys(given))), "bases given"
    else:
        pool = (training_set.labels == goal.target).nonzero().reshape(-1).cpu()
        words = f"examples of the target class {goal.target} ({training_set.class_names[goal.target]})"
        pool = pool[torch.randperm(len(pool), generator=generator(seed, attack, "bases"))]
    if count > len(pool):
        raise InputError(
            f"{attack}: a budget of {budget} ({count} of {len(training_set)}) is more than the "
            f"{len(pool)} {words}"
        )
    return pool[:count].sort().values


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Scene:
    """What a craft begins with, on the device of the first network, and how it ends.

    Arguments:
        attack: its name.
        goal: whom the poisons are about.
        training_set: the clean set.
        budget: how many poisons.
        seed: of the draw of the bases.
        indices: Int64[k], the bases, ascending.
        models: the surrogates.
        clean: Float[k c h w] in [0, 1], the bases' images.
        targets: Float[m c h w] in [0, 1].
    """

    attack: str
    goal: TargetedMisclassification
    training_set: TrainingSet
    budget: Budget
    seed: int
    indices: Tensor
    models: tuple[nn.Module, ...]
    clean: Tensor
    targets: Tensor

    @classmethod
    def of(
        cls,
        attack: str,
        goal: Goal,
        training_set: TrainingSet,
        *,
        bases: Sequence[int],
        budget: Budget,
        surrogate: nn.Module | Sequence[nn.Module] | None,
        seed: int,
    ) -> Scene:
        """The scene of one craft.

        Raises:
            InputError: the goal is not a targeted misclassification, there is no surrogate, or the budget is
                more than there are bases.
        """
        targeted = as_targeted(attack, goal, training_set)
        indices = drawn_bases(attack, targeted, training_set, bases, budget=budget, seed=seed)
        models = networks(attack, surrogate)
        device = device_of(models[0], training_set.device)
        return cls(
            attack=attack,
            goal=targeted,
            training_set=training_set,
            budget=budget,
            seed=seed,
            indices=indices,
            models=models,
            clean=training_set.subset(indices).images.to(device).float() / 255,
            targets=targeted.images.to(device).float() / 255,
        )

    def descended(
        self, loss_of: Callable[[Tensor], Tensor], *, steps: int, step_size: float, eps: float
    ) -> Tensor:
        """Float[k c h w] in [0, 1]: the bases after steps of Adam down a loss of all images, within eps.

        Steps are in standard deviations of each channel's pixels, as on standardised images.
        """
        deviations = torch.tensor(self.training_set.channel_statistics[1], device=self.clean.device)
        spread = deviations.view(1, -1, 1, 1)
        scaled = (self.clean / spread).requires_grad_()
        optimizer = torch.optim.Adam([scaled], lr=step_size)
        for _ in range(steps):
            (scaled.grad,) = torch.autograd.grad(loss_of(scaled * spread), scaled)
            optimizer.step()
            with torch.no_grad():
                scaled.copy_(within(scaled * spread, self.clean, eps) / spread)
        return scaled.detach() * spread

    def finished(self, poisons: Tensor, *, eps: float, configuration: Mapping[str, Any]) -> PoisonSet:
        """The poison set of Float[k c h w] images in [0, 1], rounded within eps."""
        chosen = self.training_set.subset(self.indices)
        change = ((poisons - self.clean) * 255).to(self.training_set.device)
        return PoisonSet.of(
            self.training_set,
            indices=self.indices,
            images=rounded(chosen.images, change, eps),
            given_labels=chosen.labels,
            goal=self.goal,
            attack=self.attack,
            configuration={
                **configuration,
                "budget": self.budget.to_json(),
                "surrogates": len(self.models),
            },
            seed=self.seed,
        )


@final
class Reader:
    """The features of several networks for a batch of images, differentiable.

    Arguments:
        attack: its name, for messages.
        models: the networks; in eval mode while they are read.
        layers: modules whose outputs are the features, each apart; empty for the input of the last linear
            layer.
        draws: with more than one, dropout is on and features are the mean over so many draws.
        seed: of dropout.
    """

    def __init__(
        self,
        attack: str,
        models: Sequence[nn.Module],
        layers: Sequence[str],
        *,
        draws: int = 1,
        seed: int = 0,
    ) -> None:
        self.models = tuple(models)
        self.draws = draws
        self.seed = seed
        self._calls = 0
        self._layers = [tuple(layers) or (last_linear(attack, model),) for model in models]
        self._side: Side = "output" if layers else "input"
        for model, paths in zip(self.models, self._layers, strict=True):
            for path in paths:
                FeatureTap(model, path)  # asks whether the model has this module

    def __call__(self, images: Tensor) -> list[Tensor]:
        """For each network and layer the features Float[b d] of Float[b c h w] images in [0, 1]."""
        self._calls += 1
        found: list[Tensor] = []
        for number, model in enumerate(self.models):
            with self._dropout(model, derive_seed(self.seed, self._calls, number), images.device):
                sums: list[Tensor] | None = None
                for _ in range(self.draws):
                    values = self._read(model, self._layers[number], images)
                    sums = (
                        values if sums is None else [one + two for one, two in zip(sums, values, strict=True)]
                    )
                assert sums is not None
            found += [one / self.draws for one in sums]
        return found

    def _read(self, model: nn.Module, paths: Sequence[str], images: Tensor) -> list[Tensor]:
        with ExitStack() as stack:
            taps = [stack.enter_context(FeatureTap(model, path, side=self._side)) for path in paths]
            model(images.to(device_of(model, images.device)))
            return [tap.value.flatten(1).to(images.device) for tap in taps]

    @contextmanager
    def _dropout(self, model: nn.Module, seed: int, device: torch.device) -> Iterator[None]:
        """Dropout on, from the seed, where there are several draws; global generators are left alone."""
        if self.draws == 1:
            yield
            return
        modules = [module for module in model.modules() if isinstance(module, _DROPOUT)]
        with own_randomness(device_of(model, device), seed=seed):
            try:
                for module in modules:
                    module.train()
                yield
            finally:
                for module in modules:
                    module.eval()


def within(images: Tensor, clean: Tensor, eps: float) -> Tensor:
    """Float images in [0, 1], none further than eps (in 1/255) from the clean ones."""
    reach = eps / 255
    return torch.maximum(torch.minimum(images, clean + reach), clean - reach).clamp(0, 1)
