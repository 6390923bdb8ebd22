"""What the trigger attacks do alike: ask for a backdoor, choose examples, stamp them, get networks ready."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unpoison._seeds import generator
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.models import preserved
from unpoison.threats import Backdoor, Budget, Goal, PoisonSet


def as_backdoor(attack: str, goal: Goal) -> Backdoor:
    """The goal, which must be a backdoor.

    Raises:
        InputError: it is not.
    """
    if not isinstance(goal, Backdoor):
        raise InputError(f"{attack}: serves the goal 'backdoor' only, not {goal.kind!r}")
    return goal


def chosen(
    attack: str, training_set: TrainingSet, candidates: Tensor, budget: Budget, *, of: str, seed: int
) -> Tensor:
    """Int64[k], ascending, on the CPU: as many of the candidates as the budget allows, drawn uniformly.

    Arguments:
        attack: its name, for messages and for the draw.
        training_set: what the budget counts in.
        candidates: Int64[m], the examples that may be drawn.
        budget: how many.
        of: what the candidates are, in words.
        seed: of the draw.

    Raises:
        InputError: the budget is more than there are candidates.
    """
    count = budget.count_in(len(training_set))
    if count > len(candidates):
        fits = (
            f"at most {len(candidates)} fit, a share of {len(candidates) / len(training_set):.4g}"
            if len(candidates)
            else "none fits"
        )
        raise InputError(
            f"{attack}: a budget of {budget} ({count} of {len(training_set)}) is more than the "
            f"{len(candidates)} examples of {of}; {fits}"
        )
    order = torch.randperm(len(candidates), generator=generator(seed, attack, "poisons"))
    return candidates.cpu()[order[:count]].sort().values


def sources(goal: Backdoor, training_set: TrainingSet) -> tuple[Tensor, str]:
    """Int64[m], the examples of the source class (or of all but the target), and what they are in words."""
    names = training_set.class_names
    candidates = goal.candidates(training_set)
    if goal.source is None:
        return candidates, f"all classes but {goal.target} ({names[goal.target]})"
    return candidates, f"class {goal.source} ({names[goal.source]})"


def targets(goal: Backdoor, training_set: TrainingSet) -> tuple[Tensor, str]:
    """Int64[m], the examples of the target class, and what they are in words."""
    goal.candidates(training_set)  # asks whether the set has the classes
    candidates = (training_set.labels == goal.target).nonzero().reshape(-1)
    return candidates, f"the target class {goal.target} ({training_set.class_names[goal.target]})"


def relabelled(
    attack: str,
    goal: Backdoor,
    training_set: TrainingSet,
    *,
    budget: Budget,
    configuration: Mapping[str, Any],
    seed: int,
) -> PoisonSet:
    """The dirty-label poison set: stamped examples of the source, labelled as the target."""
    candidates, words = sources(goal, training_set)
    indices = chosen(attack, training_set, candidates, budget, of=words, seed=seed)
    return PoisonSet.of(
        training_set,
        indices=indices,
        images=goal.trigger.stamp(training_set.subset(indices).images),
        given_labels=torch.full((len(indices),), goal.target),
        goal=goal,
        attack=attack,
        configuration={**configuration, "budget": budget.to_json()},
        seed=seed,
    )


def networks(attack: str, surrogate: nn.Module | Sequence[nn.Module] | None) -> tuple[nn.Module, ...]:
    """The surrogates, one at least.

    Raises:
        InputError: there is none.
    """
    given = (surrogate,) if isinstance(surrogate, nn.Module) else tuple(surrogate or ())
    if not given:
        raise InputError(
            f"{attack}: needs a surrogate, a network trained on the clean set or on one like it; "
            f"give surrogate="
        )
    return given


@contextmanager
def frozen(models: Sequence[nn.Module]) -> Iterator[None]:
    """Within the block the models are in eval mode and only inputs have gradients; then all is as it was."""
    with ExitStack() as stack, torch.enable_grad():
        for model in models:
            stack.enter_context(preserved(model))
            model.requires_grad_(False)
        yield


def device_of(model: nn.Module, otherwise: torch.device) -> torch.device:
    """Where the model lies."""
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), otherwise)


def last_linear(attack: str, model: nn.Module) -> str:
    """The module path of the last linear layer, whose input most papers call the features.

    Raises:
        InputError: there is none.
    """
    paths: list[str] = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not paths:
        raise InputError(f"{attack}: the surrogate has no linear layer; name the layer to read with layer=")
    return paths[-1]


def rounded(images: Tensor, change: Tensor, eps: float) -> Tensor:
    """UInt8 images with a change Float[k c h w] in 1/255, rounded so that no value moves by more than eps."""
    whole = change.round().clamp_(-int(eps), int(eps)).to(torch.int16)
    return (images.to(torch.int16) + whole.to(images.device)).clamp_(0, 255).to(torch.uint8)
