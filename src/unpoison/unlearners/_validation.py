"""Choosing among healed models without knowing the trigger.

An unlearner may look at what whoever heals has: kept examples, held out for this, and the examples to forget
with the labels they were given. The attack's success on test inputs, by which published comparisons chose, is
not among it.

Limit: the victim was trained on what is held out, so an accuracy on it says how much a healing has broken,
not how the model does on new images.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from unpoison._seeds import generator
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.training import accuracy

SHARE = 0.1
"""The part of the kept examples that is held out."""


@final
@dataclass(frozen=True, eq=False)
class Choice:
    """A candidate and what it was judged by.

    Arguments:
        state: its weights.
        forget: the share in [0, 1] of the examples to forget that it still answers as they are labelled.
        kept: its accuracy in [0, 1] on the held-out examples.
    """

    state: dict[str, Tensor]
    forget: float
    kept: float


def held_out(rest: TrainingSet, *, seed: int, share: float = SHARE) -> tuple[TrainingSet, TrainingSet]:
    """The kept examples in two: to heal with, and to choose by.

    Of each class `share` is held out, rounded down; the draw is the seed's.

    Raises:
        InputError: no class has so many examples that one could be held out.
    """
    draw = generator(seed, "unlearners", "held out")
    labels = rest.labels.cpu()
    chosen = []
    for label in range(rest.num_classes):
        own = (labels == label).nonzero()[:, 0]
        chosen.append(own[torch.randperm(len(own), generator=draw)[: int(share * len(own))]])
    out = torch.cat(chosen).sort().values
    if not len(out):
        raise InputError(
            f"{rest.name}: has too few examples a class to hold {share:g} of them out; give the option that "
            "is to be chosen"
        )
    return rest.without(out), rest.subset(out)


def judged(network: nn.Module, forget: TrainingSet, validation: TrainingSet) -> Choice:
    """The network as it is now, as a candidate."""
    state = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    return Choice(
        state,
        accuracy(network, forget, batch_size=128).rate,
        accuracy(network, validation, batch_size=128).rate,
    )


def best(candidates: Iterable[Choice], victim: Choice, *, tolerance: float) -> Choice:
    """The candidate that forgets most among those that keep the victim's accuracy less `tolerance`.

    Of equals the one with the higher accuracy. Where none keeps it, the victim itself.
    """
    allowed = [one for one in candidates if one.kept >= victim.kept - tolerance]
    return min([*allowed, victim], key=lambda one: (one.forget, -one.kept))
