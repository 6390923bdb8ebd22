"""Model selection among healed models, without knowing the trigger.

It uses kept examples that are held out for it, and the examples to forget with their labels; not the attack's
success on test inputs, by which published comparisons choose.

Limit: the model was trained on the held-out examples, so the accuracy on them measures what healing
destroyed, and not the accuracy on new images.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from unpoison._seeds import generator
from unpoison.data import Examples
from unpoison.errors import InputError
from unpoison.training import accuracy
from unpoison.unlearners._unlearner import BATCH_SIZE

SHARE = 0.1
"""The fraction of the kept examples that is held out."""


@final
@dataclass(frozen=True, eq=False)
class Choice:
    """A candidate and its measurements.

    Arguments:
        state: its weights.
        forget: the share in [0, 1] of the examples to forget that it predicts as labelled.
        kept: its accuracy in [0, 1] on the held-out examples.
    """

    state: dict[str, Tensor]
    forget: float
    kept: float


def held_out(rest: Examples, *, seed: int, share: float = SHARE) -> tuple[Examples, Examples]:
    """A random split of the kept examples: to heal with, and for model selection.

    Of each class `share` is held out, rounded down.

    Raises:
        InputError: no class has enough examples.
    """
    learn, out = held_out_indices(rest, seed=seed, share=share)
    return rest.subset(learn), rest.subset(out)


def held_out_indices(
    rest: Examples, *, seed: int, share: float = SHARE, least: int = 0
) -> tuple[Tensor, Tensor]:
    """The same split as Int64 indices, ascending; at least `least` examples of each class that has two."""
    draw = generator(seed, "unlearners", "held out")
    labels = rest.labels.cpu()
    chosen = []
    for label in range(rest.num_classes):
        own = (labels == label).nonzero()[:, 0]
        count = max(int(share * len(own)), min(least, len(own) - 1), 0)
        chosen.append(own[torch.randperm(len(own), generator=draw)[:count]])
    out = torch.cat(chosen).sort().values
    if least and not len(out):
        out = torch.arange(len(labels))  # one example a class: there is nothing to spare
    if not len(out):
        raise InputError(
            f"{rest.name}: has too few examples a class to hold {share:g} of them out for model selection"
        )
    mask = torch.ones(len(labels), dtype=torch.bool)
    mask[out] = False
    return mask.nonzero()[:, 0], out


def judged(network: nn.Module, forget: Examples, validation: Examples) -> Choice:
    """The network in its present state, as a candidate."""
    state = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    return Choice(
        state,
        accuracy(network, forget, batch_size=BATCH_SIZE).rate,
        accuracy(network, validation, batch_size=BATCH_SIZE).rate,
    )


def best(candidates: Iterable[Choice], victim: Choice, *, tolerance: float) -> Choice:
    """The candidate that forgets most among those that lose at most `tolerance` of the victim's accuracy.

    Ties go to the higher accuracy. Where every candidate loses more, the victim itself.
    """
    allowed = [one for one in candidates if one.kept >= victim.kept - tolerance]
    return min([*allowed, victim], key=lambda one: (one.forget, -one.kept))
