"""What comes of decisions: findings to heal by and to hand on; and images to compare an example with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from unpoison.detectors import Findings, Threshold
from unpoison.errors import InputError
from unpoison.report._decisions import Decisions

_CHUNK = 4096


class _Labelled(Protocol):
    """What is asked of a training set: names and labels, and no inputs."""

    @property
    def labels(self) -> Tensor: ...

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def ids(self) -> Sequence[str] | None: ...

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...


def decided_findings(decisions: Decisions, training_set: _Labelled, base: Findings | None = None) -> Findings:
    """Findings that flag the examples that a person decided to blame, and no others.

    Arguments:
        decisions: about the training set.
        training_set: which it is.
        base: the findings that she went through, if any: scores, evidence and observation are theirs.

    Raises:
        InputError: nothing is blamed.
    """
    blamed = torch.from_numpy(decisions.decided("blame"))
    if not len(blamed):
        raise InputError("no example is decided to be blamed; decide about some first")
    count = f"{len(blamed)} of {len(training_set)} training examples"
    scores = torch.from_numpy(decisions.codes == 1).double() if base is None else base.scores
    given: dict[str, Any] = {
        "method": "decisions" if base is None else f"{base.method}, then decisions",
        "configuration": {} if base is None else dict(base.configuration),
        "flagged": blamed[scores.cpu()[blamed].argsort(descending=True, stable=True)],
        "threshold": Threshold(float("inf"), "decided example by example, by a person"),
        "poison_found": True,
        "p_value": None,
        "summary": f"A person decided to blame {count}",
    }
    if base is not None:
        return dataclasses.replace(base, **given)
    return Findings(
        fingerprint=training_set.fingerprint,
        labels=training_set.labels.cpu(),
        class_names=training_set.class_names,
        scores=scores,
        ids=training_set.ids,
        **given,
    )


def nearest_example(values: Tensor, index: int, excluded: npt.NDArray[np.bool_]) -> int | None:
    """The example that is nearest to `index`, by squared difference.

    Arguments:
        values: [n ...], the images of all examples, or their features.
        index: the example to compare with; it is not its own neighbour.
        excluded: Bool[n], the examples that do not count: those that are flagged or blamed.

    Returns:
        None where every other example is excluded.

    Cost: one pass over the values; memory for 4,096 of them as floats.
    """
    allowed = torch.from_numpy(~excluded)
    allowed[index] = False
    if not bool(allowed.any()):
        return None
    asked = values[index].flatten().float().cpu()
    distances = [
        (part.cpu().flatten(1).float() - asked).square().sum(1) for part in torch.split(values, _CHUNK)
    ]
    return int(torch.cat(distances).masked_fill(~allowed, float("inf")).argmin())


def difference_image(one: Tensor, other: Tensor) -> Tensor | None:
    """UInt8[c h w]: `one` minus `other`, halved, with grey (128) where they are equal.

    None where their shapes differ. The whole range is from 0 to 255 for bytes, from 0 to 1 for numbers that
    lie between, and else that of the two images.

    >>> difference_image(torch.tensor([[[255, 7]]]).byte(), torch.tensor([[[0, 7]]]).byte()).tolist()
    [[[255, 128]]]
    """
    if one.shape != other.shape:
        return None
    pair = torch.stack([one.cpu(), other.cpu()])
    values = pair.float() / 255 if pair.dtype == torch.uint8 else pair.float()
    low, high = float(values.min()), float(values.max())
    span = 1.0 if low >= 0 and high <= 1 else high - low
    return (128 + 127 * (values[0] - values[1]) / span).round().clamp(0, 255).to(torch.uint8)
