"""Which craft a checkpoint belongs to: options, goals, budget, seed, training set and surrogates."""

from __future__ import annotations

from collections.abc import Sequence

from unpoison._artefacts import canonical_json, digest
from unpoison._checkpoints import CRAFTING, Checkpoints, digest_of
from unpoison.attacks._attack import CraftRequest


def checkpoints_of(requests: Sequence[CraftRequest]) -> Checkpoints | None:
    """The checkpoints of a craft; None if it keeps none. The requests differ in their goals alone."""
    request = requests[0]
    if request.checkpoints is None:
        return None
    identity = {
        "configuration": request.attack.configuration(),
        "goal": [
            digest(canonical_json(each.goal.to_json()), digest_of(each.goal.tensors())) for each in requests
        ],
        "budget": request.budget.to_json(),
        "seed": request.seed,
        "training set": request.training_set.fingerprint,
        "surrogate": [digest(repr(one), digest_of(one.state_dict())) for one in request.surrogates],
    }
    return Checkpoints(request.checkpoints, identity, kind=CRAFTING)
