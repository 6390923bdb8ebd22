"""`Scan`: what detectors that look at the training set alone have in common, and scores made `Findings`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from unpoison._memory import peak_bytes
from unpoison._progress import Progress
from unpoison.data import TrainingSet
from unpoison.detectors._detector import Detector, Stopwatch
from unpoison.detectors._findings import Findings, Threshold
from unpoison.detectors._observation import Observation
from unpoison.detectors._representations import Reader


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Outcome:
    """A score for every example, and the score above which an example is flagged.

    Arguments:
        scores: Float[n].
        threshold: examples with a higher score are flagged.
        how: how the threshold was chosen.
        words: what "3 of 100 training examples" do, such as "stand out in their classes".
        evidence: Float[n] columns by name.
    """

    scores: Tensor
    threshold: float
    how: str
    words: str
    evidence: Mapping[str, Tensor] = field(default_factory=dict)


class Scan(Detector):
    """A detector that looks at features of the training set and needs no observation."""

    module: str | None
    batch_size: int

    def find(
        self,
        model: nn.Module,
        training_set: TrainingSet,
        observation: Observation | None = None,
        *,
        reference: TrainingSet | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Findings:
        """See `Detector.find`; `observation` and `seed` are not used."""
        watch = Stopwatch()
        reader = Reader(
            model, training_set, module=self.module, batch_size=self.batch_size, progress=progress
        )
        outcome = self.scan(reader, reference)
        watch.lap("scores")
        return findings_of(
            self, training_set, outcome, seed=seed, seconds=watch.seconds, device=reader.device
        )

    @abstractmethod
    def scan(self, reader: Reader, reference: TrainingSet | None) -> Outcome:
        """Score every training example.

        Arguments:
            reader: of the features of the training set.
            reference: see `Detector.find`.
        """


def findings_of(
    detector: Detector,
    training_set: TrainingSet,
    outcome: Outcome,
    *,
    seed: int,
    seconds: Mapping[str, float],
    device: torch.device,
    observation: Observation | None = None,
) -> Findings:
    """The findings of a detector that flags every score above its threshold.

    Arguments:
        detector: its settings are recorded, together with the seed.
        training_set: what was searched.
        outcome: what was found.
        seed: of everything random.
        seconds: by stage.
        device: where the work was done.
        observation: what was traced, if anything.
    """
    scores, labels = outcome.scores.cpu(), training_set.labels.cpu()
    flagged = (scores > outcome.threshold).nonzero()[:, 0]
    flagged = flagged[scores[flagged].argsort(descending=True, stable=True)]
    hit = torch.bincount(labels[flagged], minlength=training_set.num_classes)
    names = [name for name, count in zip(training_set.class_names, hit.tolist(), strict=True) if count]
    among = f" (in {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''})"
    return Findings(
        method=detector.method.name,
        configuration=settings_of(detector) | {"seed": seed},
        fingerprint=training_set.fingerprint,
        labels=labels,
        class_names=training_set.class_names,
        scores=scores,
        flagged=flagged,
        threshold=Threshold(outcome.threshold, outcome.how),
        poison_found=bool(len(flagged)),
        p_value=None,
        summary=f"{len(flagged)} of {len(scores)} training examples {outcome.words}{among if names else ''}",
        evidence={name: column.cpu() for name, column in outcome.evidence.items()},
        observation=observation,
        seconds=seconds,
        peak_bytes=peak_bytes(device),
    )


def settings_of(configuration: Any) -> dict[str, Any]:
    """The fields of a dataclass as JSON values; a field that is a dataclass itself is given with its name.

    >>> from unpoison.influence import RelativeDamping
    >>> settings_of(RelativeDamping(0.1))
    {'share': 0.1}
    """
    settings: dict[str, Any] = {}
    for one in fields(configuration):
        value = getattr(configuration, one.name)
        if is_dataclass(value):
            value = {"name": type(value).__name__, **settings_of(value)}
        settings[one.name] = list(value) if isinstance(value, tuple) else value
    return settings


def beyond(scores: Tensor, count: int) -> Tensor:
    """Float64[n] `scores`, at least 0, divided by the largest that is not among the `count` largest.

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
