"""EK-FAC influence with a threshold: the baseline that Delta-Influence is compared with.

Score every training example by its influence on the margin of the wrong label at the observed input, and
flag all above a threshold. The published comparison (reference notebooks of arXiv 2411.13731) uses absolute
damping of 1e-8 and a threshold of 10, which flags about a quarter of the set; the preset `published` is that.
The default is the same with a curvature whose small eigenvalues are damped. The method does not decide
whether anything is poisoned: whatever is above the threshold is flagged.

Cost: two passes over the training set for the factors, one for the scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import nn

from unpoison._progress import Progress
from unpoison.data import TrainingSet
from unpoison.detectors._detector import Detector, Stopwatch
from unpoison.detectors._findings import Findings
from unpoison.detectors._methods import register
from unpoison.detectors._observation import Observation, check_observation
from unpoison.detectors._queries import usable_factors
from unpoison.detectors._scan import Outcome, findings_of
from unpoison.influence import (
    AbsoluteDamping,
    ClassificationTask,
    Damping,
    Factors,
    RelativeDamping,
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
        modules: which modules' parameters to track; all Linear and Conv2d by default.
        covariance_examples: fit the covariances to this many examples only.
        batch_size: examples of a forward pass.
    """

    PRESETS: ClassVar[Presets] = {
        "default": {},
        "published": {"damping": AbsoluteDamping(1e-8)},
    }

    threshold: float = 10.0
    damping: Damping = _DAMPING
    modules: tuple[str, ...] | None = None
    covariance_examples: int | None = None
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
        factors: Factors | None = None,
    ) -> Findings:
        """See `Detector.find`; `reference` is not used.

        Arguments:
            factors: EK-FAC factors fitted to this model and training set; they are fitted anew by default.
        """
        observation = check_observation(model, training_set, observation)
        watch, task = Stopwatch(), ClassificationTask()
        factors = usable_factors(
            model,
            training_set,
            factors,
            seed=seed,
            modules=self.modules,
            covariance_examples=self.covariance_examples,
            batch_size=self.batch_size,
            progress=progress,
        )
        watch.lap("factors")
        count = len(observation)
        batch = (observation.images.float() / 255, torch.full((count,), observation.answer))
        mean = torch.full((1, count), 1 / count)
        queries = precondition(
            model, factors, batch, task, combine=mean, damping=self.damping, progress=progress
        )
        found = score(model, queries, training_set, task, batch_size=self.batch_size, progress=progress)
        watch.lap("scores")
        scores = found.values[0]
        outcome = Outcome(
            scores=scores,
            threshold=self.threshold,
            how="given in advance, the same for every model and attack",
            words=f"have an influence above {self.threshold:g} on the answer "
            f"{training_set.class_names[observation.answer]!r}",
            evidence={"influence_before": scores},
        )
        return findings_of(
            self,
            training_set,
            outcome,
            seed=seed,
            seconds=watch.seconds,
            device=scores.device,
            observation=observation,
        )
