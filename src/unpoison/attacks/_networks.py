"""The networks that attacks craft on: frozen, reinitialised, and how they are trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.models import preserved, reinitialized
from unpoison.training import Recipe, whitened


@contextmanager
def frozen(models: Sequence[nn.Module]) -> Iterator[None]:
    """Within the block the models are in eval mode and only inputs have gradients; then all is as it was."""
    with ExitStack() as stack, torch.enable_grad():
        for model in models:
            stack.enter_context(preserved(model))
            model.requires_grad_(False)
        yield


def fresh_copy(template: nn.Module, training_set: TrainingSet, *, seed: int) -> nn.Module:
    """A copy with new parameters, on the CPU; layers that are fitted to images are fitted as `train` does."""
    return whitened(reinitialized(template, seed=seed).cpu(), training_set)


def recipe_of(value: Recipe | str | Mapping[str, Any]) -> Recipe:
    """A recipe, also as the name of a preset or as plain fields, "preset" among them naming what they change.

    Raises:
        InputError: there is no such preset or field, or a value is out of range.

    >>> recipe_of({"preset": "sample", "epochs": 3, "warmup_epochs": 1}).model
    'convnet-bn'
    """
    if isinstance(value, Recipe):
        return value
    if isinstance(value, str):
        return Recipe.preset(value)
    if not isinstance(value, Mapping):
        raise InputError(f"recipe: expected the name of a preset or fields, found {value!r}")
    fields = dict(value)
    preset = fields.pop("preset", None)
    return Recipe.from_dict(fields) if preset is None else Recipe.preset(preset, **fields)
