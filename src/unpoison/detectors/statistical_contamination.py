"""SCAn: a class whose features form two groups, by the covariance of all classes, is contaminated.

Tang, Wang, Tang and Zhang, "Demon in the Variant: Statistical Analysis of DNNs for Robust Backdoor
Contamination Detection" (USENIX Security 2021, arXiv 1908.00686). Not part of the published comparison;
chosen because it was made for the backdoors of that comparison, which turn ONE source class into a target,
and because it is one of the few that can find nothing in a training set. A feature is the centre of its class
plus a deviation, and deviations have the same distribution in all classes. So

1. the covariance S of deviations is estimated from all classes together (from `reference`, where there is
   one);
2. each class is cut into two groups by the likelihood under two centres and that S: 2-means in the
   metric of its inverse;
3. the statistic of a class is twice the logarithm of the likelihood ratio of two centres to one;
4. a class is contaminated when its statistic lies more than e^2 = 7.39 median absolute deviations above the
   median of all classes (the paper's constant); its smaller group is flagged.

Departures: the statistic is divided by the number of examples, as classes may differ in size. S is the pooled
covariance within classes, to which the paper's expectation-maximisation converges for classes that are large
compared with the variance of their centres. Features are first reduced to the `dimensions` in which
deviations vary most, because an S of all features takes more examples than most sets have. Poison in the set
inflates S a little; a clean `reference` avoids that.

Constants: a median absolute deviation is multiplied by 1.4826, which makes it a standard deviation where
values are normally distributed, so the limit of step 4 is 7.39 x 1.4826 = 10.96 unscaled ones. Ours are: .01
of the median (and 1e-12) is added to that deviation, because it is 0 where all classes are equal; directions
with less than 1e-10 of the largest variance are left out of S.

With fewer than three classes that have examples nothing can be judged; the summary says so.

Cost: two forward passes over the set, and d^2 n multiplications for d features. Memory: the features of the
largest class, and d^2 numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Final, final

import torch
from torch import Tensor

from unpoison._option_checks import check_options
from unpoison.detectors._estimates import Measured
from unpoison.detectors._findings import Findings
from unpoison.detectors._methods import register
from unpoison.detectors._representations import Reader
from unpoison.detectors._search import Search, Searcher
from unpoison.detectors._two_means import two_means
from unpoison.influence import Parts
from unpoison.registry import Presets

_FEWEST: Final = 3


@final
@register(
    name="statistical-contamination",
    title="SCAn",
    summary="Flags the smaller group of every class that two centres explain far better than one.",
    paper="Tang et al. 2021, arXiv 1908.00686",
    cost="two forward passes",
    presets=("original",),
    can_find_nothing=True,
    uses_reference=True,
)
@dataclass(frozen=True, kw_only=True)
class StatisticalContamination(Searcher):
    """Flag the smaller group of every class with two centres, by comparison with all classes.

    Arguments:
        threshold: in median absolute deviations above the median of all classes.
        dimensions: how many directions of deviation are kept.
        module: the module whose input is read; the network's last layer by default.
        batch_size: images of a forward pass.
    """

    PRESETS: ClassVar[Presets] = {
        "original": {},
    }

    threshold: float = math.e**2
    dimensions: int = 32
    module: str | None = None
    batch_size: int = 512

    def __post_init__(self) -> None:
        check_options(self.method.name, self, dimensions="[1, inf)", batch_size="[1, inf)")

    def memory_needed(self, measured: Measured) -> Parts:
        """See `Detector.memory_needed`."""
        return measured.by_class(self)

    def search(self, search: Search) -> Findings:
        """See the module's docstring."""
        reader = search.reader(self.module, self.batch_size)
        training_set = search.training_set
        whiten = self._whitening(reader if search.reference is None else reader.of(search.clean))
        margins = torch.full((len(training_set),), -1.0, dtype=torch.float64)
        statistics: dict[int, float] = {}
        for one in reader.by_class():
            clusters = two_means(one.values.double() @ whiten)
            statistics[one.label] = 0.0
            if clusters is not None:
                statistics[one.label] = clusters.explained / len(one.indices)
                margins[one.indices] = clusters.margin.cpu()
        labels = training_set.labels.cpu()
        of_class = torch.zeros(training_set.num_classes, dtype=torch.float64)
        for label, value in anomaly(statistics).items():
            of_class[label] = value
        contaminated = (of_class > self.threshold)[labels]
        findings = search.findings(
            scores=torch.where(contaminated, margins, margins - 2),
            threshold=0.0,
            how="in the smaller group of a class whose likelihood ratio lies more than "
            f"{self.threshold:.2f} median absolute deviations above the median of all classes",
            words="form a second group in their class",
            evidence={"anomaly": of_class[labels]},
        )
        if len(statistics) < _FEWEST:
            findings = replace(
                findings,
                summary=f"Cannot be judged: SCAn compares classes and needs {_FEWEST} or more with examples; "
                f"there are {len(statistics)}. Scan with another method, such as activation-clustering",
            )
        return findings

    def _whitening(self, reader: Reader) -> Tensor:
        """Float64[d k]: deviations multiplied by it have covariance I in `dimensions` dimensions."""
        scatter: Tensor | None = None
        for one in reader.by_class():
            deviations = one.values.double() - one.values.double().mean(0)
            part = deviations.t() @ deviations
            scatter = part if scatter is None else scatter.add_(part)
        assert scatter is not None
        values, vectors = torch.linalg.eigh(scatter / len(reader.training_set))
        values, vectors = values.flip(0)[: self.dimensions], vectors.flip(1)[:, : self.dimensions]
        kept = values > 1e-10 * values.amax().clamp(min=1e-300)
        whiten: Tensor = vectors[:, kept] / values[kept].sqrt()
        return whiten


def anomaly(statistics: dict[int, float]) -> dict[int, float]:
    """How far each statistic is above the median, in median absolute deviations times 1.4826.

    0 for all where there are fewer than three.

    >>> {label: round(value, 2) for label, value in anomaly({0: 1.0, 1: 1.1, 2: 0.9, 3: 8.0}).items()}
    {0: -0.31, 1: 0.31, 2: -0.94, 3: 43.78}
    """
    values = torch.tensor(list(statistics.values()), dtype=torch.float64)
    if len(values) < _FEWEST:
        return dict.fromkeys(statistics, 0.0)
    median = values.quantile(0.5)
    # Without the last terms it is 0 where all classes are equal.
    deviation = 1.4826 * (values - median).abs().quantile(0.5) + 1e-2 * median + 1e-12
    return dict(zip(statistics, ((values - median) / deviation).tolist(), strict=True))
