"""`Voting`: networks of one architecture whose votes are counted."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Final, Self, final

import torch
from torch import Tensor, nn

from unpoison._inputs import Inputs
from unpoison.models import logits_of

NONE: Final = -1
"""The vote of a network that has none."""


@final
class Voting(nn.Module):
    """Gives votes in place of logits.

    Arguments:
        networks: each takes the same inputs and returns logits.
        uses: Int64[k d], the parts of the training set that each learned from.
        voters: Bool[k], the networks that vote.
    """

    uses: Tensor
    voters: Tensor

    def __init__(self, networks: Sequence[nn.Module], uses: Tensor, voters: Tensor) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.register_buffer("uses", uses.clone())
        self.register_buffer("voters", voters.clone())

    @classmethod
    def like(cls, network: nn.Module, *, networks: int, spread: int) -> Self:
        """Copies of a network, to receive the weights of a stored vote."""
        copies = [copy.deepcopy(network) for _ in range(networks)]
        uses = torch.zeros(networks, spread, dtype=torch.int64)
        return cls(copies, uses, torch.ones(networks, dtype=torch.bool))

    def votes(self, inputs: Inputs) -> Tensor:
        """Int64[b k]: the class that each network votes for, or -1."""
        cast = [logits_of(one, inputs).argmax(1) for one in self.networks]
        return torch.stack(cast, 1).masked_fill(~self.voters, NONE)

    def forward(self, inputs: Tensor) -> Tensor:
        """Float[b classes]: the votes; of equal ones the lower class is ahead by less than one."""
        logits = [logits_of(one, inputs) for one in self.networks]
        classes = logits[0].shape[1]
        labels = torch.arange(classes, device=logits[0].device)
        cast = torch.stack([one.argmax(1) for one in logits], 1).masked_fill(~self.voters, NONE)
        counts = (cast[:, :, None] == labels).sum(1)
        return counts.to(logits[0].dtype) + (classes - 1 - labels) / (2 * classes)
