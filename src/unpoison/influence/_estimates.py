"""What the influence engine takes, estimated before it starts.

The formulas are those that the docstrings of `_factors`, `_queries`, `_scores` and `_projection` state. The
most is taken in one of the stages; `influence_bytes` gives the parts of that one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import nn

from unpoison._memory import allowed_memory
from unpoison.influence._layers import Layer
from unpoison.influence._queries import QUERY_SHARE, QUERY_SLICE
from unpoison.influence._sweep import AT_ONCE, CHUNK, FIRST, activation_bytes, default_workspace, where
from unpoison.influence._tracked import tracked_layers
from unpoison.models import Activations

Parts = Mapping[str, float]
"""Bytes by what takes them."""


def influence_bytes(
    model: nn.Module,
    activations: Activations,
    *,
    modules: Sequence[str] | None,
    batch_size: int,
    queries: int,
    asked: int,
    examples: int,
    fit: bool = True,
    in_blocks: bool = False,
) -> Parts:
    """Bytes of factors, queries and scores, in the stage that takes most.

    Arguments:
        model: the network.
        activations: of one example of it.
        modules: the tracked ones, as for `fit_factors`.
        batch_size: examples of a forward pass.
        queries: m, how many preconditioned queries are held.
        asked: q, how many inputs they are combined from.
        examples: how many are scored at a time.
        fit: whether factors are fitted.
        in_blocks: whether `influence_scores` takes the queries in blocks, where they do not fit at once.
    """
    layers = tracked_layers(model, modules)
    device, dtype = where(model)
    size = dtype.itemsize
    squares = size * sum(map(_squares, layers))
    values = size * sum(math.prod(layer.shape) for layer in layers)
    largest = size * max(math.prod(layer.shape) for layer in layers)
    workspace = default_workspace(device) + min(CHUNK, 2 * AT_ONCE * largest)
    most = max(activation_bytes(device), activations.training(FIRST))
    sweep = min(activations.training(batch_size), most)
    # The matrix, its eigenvectors and twice as much work space, in float64.
    eigen = 8 * 4 * max((_largest_square(layer) for layer in layers), default=0)
    factors = squares + values
    held = float(queries * values)
    if in_blocks:
        held = min(held, max(QUERY_SHARE * allowed_memory(device), largest))
    stages: list[Parts] = [
        {
            "factors": factors,
            "queries": held + 3 * min(held, max(largest, QUERY_SLICE)),
            "activations": min(activations.training(min(asked, batch_size)), most),
        },
        {
            "factors": factors,
            "queries": held,
            "activations": sweep + workspace,
            "scores": 2 * 8 * queries * examples,
        },
    ]
    if fit:
        stages += [
            {"factors": squares + eigen},
            {"factors": factors, "activations": sweep + workspace},
        ]
    return max(stages, key=lambda parts: sum(parts.values()))


def projection_bytes(
    model: nn.Module,
    activations: Activations,
    *,
    modules: Sequence[str] | None,
    batch_size: int,
    dimensions: int,
    examples: int,
    workspace_bytes: int | None,
) -> Parts:
    """Bytes of `project`, arguments as for `influence_bytes` and there."""
    layers = tracked_layers(model, modules)
    device, dtype = where(model)
    workspace = default_workspace(device) if workspace_bytes is None else workspace_bytes
    largest = dtype.itemsize * max(math.prod(layer.shape) for layer in layers)
    return {
        "projections": dtype.itemsize * examples * dimensions,
        "sketches": (8 + dtype.itemsize) * sum(math.prod(layer.shape) for layer in layers),
        "activations": min(
            activations.training(batch_size), max(activation_bytes(device), activations.training(FIRST))
        )
        + max(workspace, 2 * largest),
    }


def _squares(layer: Layer) -> int:
    groups, outputs, inputs = layer.shape
    return groups * (outputs**2 + inputs**2) if layer.kronecker else 0


def _largest_square(layer: Layer) -> int:
    groups, outputs, inputs = layer.shape
    return groups * max(outputs, inputs) ** 2 if layer.kronecker else 0
