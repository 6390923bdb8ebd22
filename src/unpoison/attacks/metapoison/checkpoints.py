"""Which craft a checkpoint belongs to: options, goals, budget, seed, training set and surrogates."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from unpoison._artefacts import canonical_json, digest
from unpoison._checkpoints import CRAFTING, Checkpoints
from unpoison.attacks._attack import CraftRequest
from unpoison.threats import Goal


def checkpoints_of(requests: Sequence[CraftRequest]) -> Checkpoints | None:
    """The checkpoints of a craft; None if it keeps none. The requests differ in their goals alone."""
    request = requests[0]
    if request.checkpoints is None:
        return None
    identity = {
        "configuration": request.attack.configuration(),
        "goal": [_goal_digest(each.goal) for each in requests],
        "budget": request.budget.to_json(),
        "seed": request.seed,
        "training set": request.training_set.fingerprint,
        "surrogate": [_network_digest(network) for network in request.surrogates],
    }
    return Checkpoints(request.checkpoints, identity, kind=CRAFTING)


def _goal_digest(goal: Goal) -> str:
    tensors = goal.tensors()
    return digest(canonical_json(goal.to_json()), *(_bytes(tensors[name]) for name in sorted(tensors)))


def _network_digest(network: nn.Module) -> str:
    state = network.state_dict()
    return digest(repr(network), *state, *map(_bytes, state.values()))


def _bytes(tensor: Tensor) -> bytes:
    content: bytes = tensor.detach().cpu().contiguous().numpy().tobytes()
    return content
