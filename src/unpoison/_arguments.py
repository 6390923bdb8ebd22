"""The arguments of the workflow's functions: that each is of its kind, before anything is done with it.

What is checked here is what Python's own errors would not name: `'str' object has no attribute 'model'`. What
fits together is checked where it is known, and has errors of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import Signature
from typing import Any, Final

import torch
from torch import Tensor, nn

from unpoison.detectors import Findings, Observation
from unpoison.errors import InputError
from unpoison.influence import InfluenceIndex
from unpoison.tasks import Task
from unpoison.threats import Budget, Goal, PoisonSet
from unpoison.training import Recipe, Trained


def check_arguments(verb: str, signature: Signature, given: Mapping[str, Any]) -> None:
    """Refuse an argument of another kind.

    Arguments:
        verb: the function.
        signature: of it; an argument that has its default is not checked.
        given: the arguments by name.

    Raises:
        InputError: the first one that is wrong, with what it must be.
    """
    for name, value in given.items():
        if name not in _EXPECTED or value is signature.parameters[name].default:
            continue
        fits, expected = _EXPECTED[name]
        if not fits(value):
            raise InputError(f"{verb}: {name} must be {expected}, found {type(value).__name__} {value!r:.60}")
    if given.get("device") is not None:
        _check_device(verb, given["device"])


def _check_device(verb: str, device: Any) -> None:
    try:
        known = torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError(
            f"{verb}: device must be a torch.device or its name, such as 'cpu' or 'cuda', found {device!r}"
        ) from None
    if known.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"{verb}: device {known}: PyTorch sees no CUDA device here; give 'cpu'")
    if known.type == "cuda" and (known.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"{verb}: device {known}: PyTorch sees {torch.cuda.device_count()} here, from cuda:0 on"
        )


def _of(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds)


def _is_model(value: Any) -> bool:
    # What else is no network is said by `models.check_network`, of which some verbs have more to say.
    return isinstance(value, Trained | nn.Module)


def _are_surrogates(value: Any) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return True
    return isinstance(value, Sequence) and not isinstance(value, str) and all(map(_is_model, value))


def _are_observations(value: Any) -> bool:
    if isinstance(value, Observation):
        return True
    return isinstance(value, Sequence) and all(isinstance(one, Observation) for one in value) and bool(value)


def _are_indices(value: Any) -> bool:
    if isinstance(value, Findings | Tensor):
        return True
    try:
        return not isinstance(value, str) and torch.as_tensor(value).ndim <= 1
    except (TypeError, ValueError, RuntimeError):
        return False


def _is_normalization(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and len(value) == 2
        and all(hasattr(part, "__len__") and not isinstance(part, str) for part in value)
    )


_EXPECTED: Final[Mapping[str, tuple[Callable[[Any], bool], str]]] = {
    "goal": (_of(Goal), "a goal, such as threats.Backdoor(...)"),
    "budget": (_of(Budget), "Budget(share=...) or Budget(count=...)"),
    "recipe": (_of(Recipe), "a Recipe, such as Recipe.preset('sample')"),
    "poison": (_of(PoisonSet), "a PoisonSet, as craft returns it"),
    "model": (_is_model, "a torch.nn.Module or a Trained, as train returns it"),
    "start": (_is_model, "a torch.nn.Module or a Trained"),
    "surrogates": (_are_surrogates, "networks, or how many to train"),
    "observation": (_are_observations, "an Observation, or a list of them"),
    "findings": (_are_indices, "Findings, or a list of indices"),
    "groups": (lambda value: hasattr(value, "__len__"), "a name or number for each training example"),
    "index": (_of(InfluenceIndex), "an InfluenceIndex, as index returns it"),
    "task": (_of(Task), "a tasks.ClassificationTask"),
    "include": (_of(Tensor), "a bool tensor"),
    "normalization": (_is_normalization, "the means and the deviations of the channels"),
    "retrain": (callable, "a function of the kept indices and the kept examples"),
    "progress": (callable, "a function of stage, done and total"),
    "rounds": (lambda value: isinstance(value, int), "a whole number"),
}
