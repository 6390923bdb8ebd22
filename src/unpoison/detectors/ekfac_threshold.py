"""EK-FAC influence with a threshold: the baseline that Delta-Influence is compared with.

Score every training example by its influence on the wrong label's margin at the suspect, and flag all above a
threshold. The published comparison (reference notebooks of arXiv 2411.13731) uses absolute damping 1e-8 and a
threshold of 10, under which it flags about a quarter of the set; the preset `published` is that. The
default is the same with a curvature whose small eigenvalues are damped. There is no decision whether anything
is poisoned at all: whatever is above the threshold is flagged.

Cost: two passes over the training set for the factors, one for the scores.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import ClassVar, final

import torch
from torch import nn

from unpoison._memory import peak_bytes
from unpoison._progress import Progress
from unpoison._seeds import derive_seed
from unpoison.data import TrainingSet
from unpoison.detectors._detector import Detector
from unpoison.detectors._findings import Findings, Threshold
from unpoison.detectors._methods import register
from unpoison.detectors._observation import Observation
from unpoison.detectors.delta_influence import check_observation
from unpoison.influence import (
    AbsoluteDamping,
    ClassificationTask,
    Damping,
    RelativeDamping,
    fit_factors,
    precondition,
    score,
)
from unpoison.registry import Presets

_DAMPING = RelativeDamping(0.1)


@final
@register(
    name="ek-fac",
    title="EK-FAC influence with a threshold",
    summary="Flags the examples whose influence on the wrong answer is above a given number.",
    paper="Grosse et al. 2023, arXiv 2308.03296; as compared in arXiv 2411.13731",
    cost="three passes with per-example gradients",
    presets=("default", "published"),
    needs_observation=True,
)
@dataclass(frozen=True, kw_only=True)
class EKFACThreshold(Detector):
    """Flag the examples whose influence on the wrong prediction exceeds a threshold.

    Arguments:
        threshold: in the unit of the scores, which depends on the model, the data and the damping.
        damping: of the curvature.
        batch_size: examples of a forward pass.
    """

    PRESETS: ClassVar[Presets] = {
        "default": {},
        "published": {"damping": AbsoluteDamping(1e-8)},
    }

    threshold: float = 10.0
    damping: Damping = _DAMPING
    batch_size: int = 128

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
        """See `Detector.find`; `reference` is not used."""
        observation = check_observation(model, training_set, observation)
        task = ClassificationTask()
        clock = time.perf_counter()
        factors = fit_factors(
            model,
            training_set,
            task,
            seed=derive_seed(seed, "factors"),
            batch_size=self.batch_size,
            progress=progress,
        )
        fitted = time.perf_counter()
        count = len(observation)
        batch = (observation.images.float() / 255, torch.full((count,), observation.predicted))
        mean = torch.full((1, count), 1 / count)
        queries = precondition(model, factors, batch, task, combine=mean, damping=self.damping)
        scores = (
            score(model, queries, training_set, task, batch_size=self.batch_size, progress=progress)
            .values[0]
            .cpu()
        )
        flagged = (scores > self.threshold).nonzero()[:, 0]
        flagged = flagged[scores[flagged].argsort(descending=True, stable=True)]
        name = training_set.class_names[observation.predicted]
        return Findings(
            method="ek-fac",
            configuration={
                "threshold": self.threshold,
                "damping": {"name": type(self.damping).__name__, **asdict(self.damping)},  # type: ignore[call-overload]
                "batch_size": self.batch_size,
                "seed": seed,
            },
            fingerprint=training_set.fingerprint,
            labels=training_set.labels.cpu(),
            class_names=training_set.class_names,
            scores=scores,
            flagged=flagged,
            threshold=Threshold(self.threshold, "given in advance, the same for every model and attack"),
            poison_found=bool(len(flagged)),
            p_value=None,
            summary=f"{len(flagged)} of {len(scores)} training examples push towards {name!r} by more than "
            f"{self.threshold:g}",
            evidence={"influence_before": scores},
            observation=observation,
            seconds={"factors": fitted - clock, "scores": time.perf_counter() - fitted},
            peak_bytes=peak_bytes(scores.device),
        )
