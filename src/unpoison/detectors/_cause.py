"""What kind of cause the examples speak for that an answer goes back to most, with the numbers behind it.

Poison or not, an answer goes back to some training examples. The numbers: how many stand out, how many unlike
images they are (the effective number of Leinster and Cobbold, 2012, with the similarities of
`_near_duplicates`), what share of them resembles one of them, which label the model would give them if it
were not for their own, and how well they are fitted, as the rank of their margins within the label.

    trigger-like       poison was found, by shared gradients: many unlike images, one label
    optimised images   poison was found, by the artifacts of images that were optimised one by one
    near-duplicates    at least half of what stands out is one series of similar images
    label noise        at least half would be given the same other label, and they are fitted worse than nine
                       in ten of the label: they are likely to be mislabelled
    hard region        none of these: the answer leans a little on much of its class

The last three are said where no poison was found; they are hints for a person who looks at the images.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, final

import torch
from torch import Tensor

from unpoison.errors import printable

Kind = Literal["trigger-like", "optimised images", "near-duplicates", "label noise", "hard region"]

# Set by hand: no rate of these kinds has been measured, and no decision about poison depends on them.
_SERIES: Final = 0.5
"""The share of the examples that one series of near-duplicates has at least."""
_FEWEST: Final = 3
"""Fewer examples speak for no series and no label noise."""
_SECOND: Final = 0.5
"""The share of the examples that would be given the same other label, at least."""
_BADLY_FITTED: Final = 0.1
"""The largest median rank of their margins within the label that counts as badly fitted."""


@final
@dataclass(frozen=True, kw_only=True)
class Cause:
    """What the responsible examples have in common.

    Arguments:
        kind: see the module's docstring.
        examples: how many examples stand out, or are flagged.
        distinct: the effective number of unlike images among them.
        largest_series: the share of them that resembles one of them.
        second_label: the label that most of them would be given if it were not for their own.
        second_share: the share of them that would be.
        margin_rank: the median rank of their margins within the label; 0 is fitted worst, 1 best.
    """

    kind: Kind
    examples: int
    distinct: float
    largest_series: float
    second_label: int | None
    second_share: float
    margin_rank: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def describe(self, class_names: tuple[str, ...]) -> str:
        """One sentence."""
        second = "" if self.second_label is None else printable(class_names[self.second_label])
        numbers = f"{self.examples} examples, {self.distinct:.3g} of them unlike each other"
        match self.kind:
            case "trigger-like":
                return f"Many unlike images with one label: {numbers}"
            case "optimised images":
                return f"Images with the artifacts of optimisation: {numbers}"
            case "near-duplicates":
                return (
                    f"A series of near-duplicates: {self.largest_series:.0%} of {self.examples} examples "
                    "resemble one image"
                )
            case "label noise":
                return (
                    f"Probably wrong labels: {self.second_share:.0%} of {self.examples} badly fitted "
                    f"examples look like {second!r}"
                )
            case "hard region":
                return f"A hard region of the class: {numbers}"


def cause_of(
    members: Tensor,
    alike: Tensor,
    logits: Tensor,
    misfits: Tensor,
    label: int,
    *,
    found: Kind | None,
) -> Cause:
    """The cause that the members of a label speak for.

    Arguments:
        members: Int64[m] places among the k examples with the label.
        alike: Float64[m], see `NearDuplicates.alike_among`.
        logits: Float[m classes], the model's, of the members.
        misfits: Float[k], larger for examples that are fitted worse: minus their margins.
        label: their label.
        found: the kind, where poison was found.
    """
    count = len(members)
    if not count:
        return Cause(
            kind=found or "hard region",
            examples=0,
            distinct=0.0,
            largest_series=0.0,
            second_label=None,
            second_share=0.0,
            margin_rank=0.5,
        )
    others = logits.double().clone()
    others[:, label] = -torch.inf
    second = torch.bincount(others.argmax(1), minlength=logits.shape[1])
    ranks = (-misfits).argsort(stable=True).argsort(stable=True).double() / max(len(misfits) - 1, 1)
    series = float(alike.max()) / count
    share = float(second.max()) / count
    rank = float(ranks[members].median())
    kind: Kind
    if found is not None:
        kind = found
    elif count >= _FEWEST and series >= _SERIES:
        kind = "near-duplicates"
    elif count >= _FEWEST and share >= _SECOND and rank <= _BADLY_FITTED:
        kind = "label noise"
    else:
        kind = "hard region"
    return Cause(
        kind=kind,
        examples=count,
        distinct=float(count**2 / alike.sum()),
        largest_series=series,
        second_label=int(second.argmax()),
        second_share=share,
        margin_rank=rank,
    )
