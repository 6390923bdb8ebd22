"""A detector in one file: the training examples whose logits are closest to those of a wrong prediction.

Stages: the logits of the observation and of all examples; the score is 1 / (1 + distance) for the predicted
label, else 0; what is above `level` is flagged. Cost: one forward pass. Memory: n scores.
Limit: it finds the neighbours of ordinary errors, too.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch

from unpoison.detectors import Findings, Search, Searcher, register
from unpoison.errors import InputError
from unpoison.registry import Presets
from unpoison.training import predict


@final
@register(
    name="logit-neighbours",
    title="Logit neighbours",
    summary="Flags the examples with the predicted label whose logits are closest to the observation's.",
    paper="an example of the documentation",
    cost="one forward pass",
    presets=("default", "strict"),
    needs_observation=True,
    can_find_nothing=True,
)
@dataclass(frozen=True, kw_only=True)
class LogitNeighbours(Searcher):
    """Flag examples with a score above `level`, in (0, 1), reading `batch_size` images at a time."""

    PRESETS: ClassVar[Presets] = {"default": {}, "strict": {"level": 0.8}}
    level: float = 0.5
    batch_size: int = 512

    def search(self, search: Search) -> Findings:
        examples, n = search.training_set, len(search.training_set)
        query = predict(search.model, search.observation.images).double().mean(0).cpu()
        scores = torch.zeros(n, dtype=torch.float64)
        for start in range(0, n, self.batch_size):
            stop = min(start + self.batch_size, n)
            distance = (predict(search.model, examples.images[start:stop]).cpu() - query).norm(dim=1)
            scores[start:stop] = (examples.labels[start:stop].cpu() == search.answer) / (1 + distance)
            if search.progress is not None:
                search.progress("logits", stop, n)
        if not scores.isfinite().all():
            raise InputError(f"logit-neighbours: the model gives no finite logits for {examples.name}")
        return search.findings(
            scores=scores,
            threshold=self.level,
            how="given as an option",
            words="have logits close to those of the observation",
        )
