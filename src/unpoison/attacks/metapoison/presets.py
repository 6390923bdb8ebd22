"""The settings of the paper, as its public code has them; ours are the defaults of `MetaPoison`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from unpoison.threats import ColorGrid, LInf
from unpoison.training import Recipe

PLAIN_SGD: Final = Recipe(
    model="convnet-bn",
    epochs=200,
    batch_size=125,
    learning_rate=0.1,
    momentum=0,
    nesterov=False,
    weight_decay=0,
)
"""How the surrogates of the paper are trained, but for the schedule."""

PUBLISHED: Final[Mapping[str, Any]] = {
    "surrogates": 24,
    "lifetime": 24,
    "steps": 61,
    "unroll": 2,
    "loss_steps": "all",
    "objective": "carlini-wagner-zeroed",
    "confidence": 100,
    "trajectory": "clean",
    "target_in_batch": True,
    "poisons_per_batch": 0,
    "selection": "first",
    "perturbation": ColorGrid(eps=0.04, resolution=10, smoothness=1) + LInf(8),
    "optimizer": "adam",
    "rate": 200,
    "warmup": 5,
    "drop_every": 20,
    "drop_factor": 0.1,
    "recipe": replace(PLAIN_SGD, schedule="multistep", milestones=(100, 150), warmup_epochs=5),
    "start": "scratch",
}
"""From scratch: figures 4 and 5."""

FINE_TUNING: Final[Mapping[str, Any]] = {
    **PUBLISHED,
    "steps": 101,
    "unroll": 4,
    "perturbation": LInf(8),
    "recipe": replace(PLAIN_SGD, model="convnet", learning_rate=0.01),
    "start": "pretrained",
}
"""Of a pretrained ConvNet: figure 3."""
