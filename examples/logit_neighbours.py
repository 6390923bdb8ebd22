"""A detector in one file: the training examples whose logits are closest to those of a wrong prediction.

Stages: the logits of the query and of all examples; the score is 1 / (1 + distance) for the predicted label,
else 0; what is above `level` is flagged. Cost: one forward pass; memory: n logits. Limit: it finds the
neighbours of ordinary errors, too.
"""

import time
from dataclasses import asdict, dataclass
from typing import final

import torch

from unpoison.detectors import Detector, Findings, Threshold, check_observation, register
from unpoison.errors import InputError
from unpoison.runs import peak_memory_bytes
from unpoison.training import predict


@final
@register(
    name="logit-neighbours",
    title="Logit neighbours",
    summary="Flags the examples with the predicted label whose logits are closest to the query's.",
    paper="an example of the documentation",
    cost="one forward pass",
    needs_observation=True,
    can_find_nothing=True,
)
@dataclass(frozen=True, kw_only=True)
class LogitNeighbours(Detector):
    """Flag examples with a score above `level`, in (0, 1), reading `batch_size` images at a time."""

    level: float = 0.5
    batch_size: int = 512

    def find(self, model, training_set, observation=None, *, reference=None, seed=0, progress=None):
        observation = check_observation(model, training_set, observation)
        started, n = time.perf_counter(), len(training_set)
        query = predict(model, observation.images).double().mean(0).cpu()
        scores = torch.zeros(n, dtype=torch.float64)
        for start in range(0, n, self.batch_size):
            stop = min(start + self.batch_size, n)
            distance = (predict(model, training_set.images[start:stop]).cpu() - query).norm(dim=1)
            same = training_set.labels[start:stop].cpu() == observation.predicted
            scores[start:stop] = same / (1 + distance)
            if progress is not None:
                progress("logits", stop, n)
        if not scores.isfinite().all():
            raise InputError(f"logit-neighbours: the model gives no finite logits for {training_set.name}")
        order = scores.argsort(descending=True, stable=True)
        flagged = order[scores[order] > self.level]
        return Findings(
            method="logit-neighbours", configuration=asdict(self), fingerprint=training_set.fingerprint,
            labels=training_set.labels.cpu(), class_names=training_set.class_names, scores=scores,
            flagged=flagged, threshold=Threshold(self.level, "given as an option"), p_value=None,
            poison_found=bool(len(flagged)), summary=f"{len(flagged)} of {n} examples are close to the query",
            observation=observation, seconds={"logits": time.perf_counter() - started},
            peak_bytes=peak_memory_bytes(),
        )  # fmt: skip
