"""What detectors that look at the training set alone have in common: from scores to `Findings`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from unpoison._memory import peak_bytes
from unpoison.data import TrainingSet
from unpoison.detectors._findings import Findings, Threshold
from unpoison.detectors._observation import Observation


def findings_of(
    method: str,
    detector: Any,
    training_set: TrainingSet,
    *,
    scores: Tensor,
    threshold: float,
    how: str,
    words: str,
    evidence: Mapping[str, Tensor],
    seconds: Mapping[str, float],
    device: torch.device,
    observation: Observation | None = None,
) -> Findings:
    """Flag what lies above the threshold.

    Arguments:
        method: the detector's name.
        detector: its configuration, a dataclass.
        training_set: what was searched.
        scores: Float[n].
        threshold: examples with a higher score are flagged.
        how: how the threshold was chosen.
        words: what "3 of 100 training examples" do, such as "stand out in their classes".
        evidence: Float[n] columns by name.
        seconds: by stage.
        device: where the work was done.
        observation: what was asked about, if anything.
    """
    scores = scores.cpu()
    flagged = (scores > threshold).nonzero()[:, 0]
    flagged = flagged[scores[flagged].argsort(descending=True, stable=True)]
    hit = torch.bincount(training_set.labels.cpu()[flagged], minlength=training_set.num_classes)
    names = [name for name, count in zip(training_set.class_names, hit.tolist(), strict=True) if count]
    among = f" (in {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''})"
    return Findings(
        method=method,
        configuration=json_values(asdict(detector)),
        fingerprint=training_set.fingerprint,
        labels=training_set.labels.cpu(),
        class_names=training_set.class_names,
        scores=scores,
        flagged=flagged,
        threshold=Threshold(threshold, how),
        poison_found=bool(len(flagged)),
        p_value=None,
        summary=f"{len(flagged)} of {len(scores)} training examples {words}{among if names else ''}",
        evidence={name: column.cpu() for name, column in evidence.items()},
        observation=observation,
        seconds=seconds,
        peak_bytes=peak_bytes(device),
    )


def json_values(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Tuples as lists, as JSON has them.

    >>> json_values({"a": (1, 2), "b": None})
    {'a': [1, 2], 'b': None}
    """
    return {key: list(value) if isinstance(value, tuple) else value for key, value in configuration.items()}


def beyond(scores: Tensor, count: int) -> Tensor:
    """Float64[n] `scores`, at least 0, in units of the largest that is not among the `count` largest.

    What is above 1 is to be removed: `count` examples, fewer where several are equal.

    >>> beyond(torch.tensor([1.0, 8.0, 4.0, 2.0]), 1)
    tensor([0.2500, 2.0000, 1.0000, 0.5000], dtype=torch.float64)
    """
    scores = scores.double()
    count = min(count, len(scores) - 1)
    cut = scores.sort(descending=True).values[count]
    if float(cut) > 0:
        return scores / cut
    largest = scores.max()
    return torch.where(scores > 0, 1 + scores / largest.clamp(min=1e-300), 0.0) if count else scores
