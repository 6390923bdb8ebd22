"""A control: drop the examples of highest loss.

Examples that are isolated in gradient space mostly have a high loss, too. This control drops as many examples
before the same epochs by their loss, so a remaining difference is due to the geometry of gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from unpoison._stable import cross_entropy
from unpoison.defenses._dropping import ControlDrop
from unpoison.defenses._gradients import check_logits
from unpoison.defenses._methods import register


@final
@register(
    name="loss-drop",
    title="Drop of the highest losses",
    summary="A control: drops the examples of highest loss, as many and when another defense does.",
    paper="a control",
    cost="a round: one forward pass",
    drops_examples=True,
    copies_drops=True,
)
@dataclass(frozen=True, kw_only=True)
class LossDrop(ControlDrop):
    """Drop the highest losses, cumulatively, over all classes together; arguments as `ControlDrop`."""

    def _out(
        self, epoch: int, logits: Tensor | None, labels: Tensor, included: Tensor, alive: Tensor
    ) -> Tensor:
        assert logits is not None
        check_logits(logits, labels)
        losses = cross_entropy(logits.double(), labels, reduction="none").masked_fill(~alive, -1.0)
        out = included & ~alive
        out[losses.argsort(descending=True, stable=True)[: self._size(epoch, included, alive)]] = True
        return out
