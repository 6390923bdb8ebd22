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

from unpoison._option_checks import check_options
from unpoison.detectors._estimates import Measured
from unpoison.detectors._findings import Findings
from unpoison.detectors._methods import register
from unpoison.detectors._search import OF_INFLUENCE, Search, Searcher
from unpoison.influence import AbsoluteDamping, Damping, Parts, RelativeDamping
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
    uses_index=True,
)
@dataclass(frozen=True, kw_only=True)
class EKFACThreshold(Searcher):
    """Flag the examples whose influence on the wrong prediction exceeds a threshold.

    Arguments:
        threshold: in the unit of the scores, which depends on the model, the data and the damping.
        damping: of the curvature.
        modules: which modules' parameters to track; all linear and convolution layers by default.
        covariance_examples: fit the covariances to this many examples only.
        eigenvalue_examples: fit the eigenvalues to this many examples only.
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
    eigenvalue_examples: int | None = None
    batch_size: int = 128

    def __post_init__(self) -> None:
        check_options(
            self.method.name,
            self,
            **OF_INFLUENCE,
        )

    def memory_needed(self, measured: Measured) -> Parts:
        """See `Detector.memory_needed`."""
        return measured.influence(self, queries=1, asked=measured.observed)

    def search(self, search: Search) -> Findings:
        """See the module's docstring."""
        scores = search.influence_on_the_answer().values[0]
        return search.findings(
            scores=scores,
            threshold=self.threshold,
            how="given in advance, the same for every model and attack",
            words=f"have an influence above {self.threshold:g} on the answer {search.answer_name!r}",
            evidence={"influence_before": scores},
        )
