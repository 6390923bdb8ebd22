"""SPECTRE: spectral signatures after whitening by a robust covariance of the class.

Hayase, Kong, Somani and Oh, "SPECTRE: Defending Against Backdoor Attacks Using Robust Statistics" (ICML 2021,
arXiv 2104.11315). Not part of the published comparison; chosen because the poison is seldom what a class
varies most by, which defeats spectral signatures there, but is once the covariance of the clean examples is
divided out. For each class:

1. the features are centred and reduced to their k leading principal components;
2. mean and covariance of the clean examples are estimated in spite of the poison;
3. the features are whitened by them, so that clean examples have covariance about I;
4. QUE score (Dong, Hopkins and Li, 2019) of a whitened h: h^T Q h / tr Q, where
   Q = exp(4 (S - I) / (|S| - 1)) and S is the second moment of all whitened features, poison included;
5. the 1.5 eps of the class with the highest scores are removed.

k is one of 1, 4, 9, ..., 64, and the target class one of all: those with the largest mean QUE score after
whitening with the covariance of what would remain. Only in that class anything is flagged, as in the paper,
which assumes that there is one target; the method does not decide whether there is any poison.

Departures: the covariance is estimated by the minimum covariance determinant (Rousseeuw and Van Driessen,
1999: the 1 - 1.5 eps of the examples nearest to their own centre in their own metric, found by iteration)
in place of the paper's filter, which has the same aim and more constants. eps, known in the paper, is the
option `expected_share`, the share of the target class, .05 by default.

Constants that are ours: k is at most an eighth of the examples of the class, below which their covariance
says little; a class in which 1.5 eps are less than one example has no score. The minimum covariance
determinant begins with the examples nearest to the median of each component, in units of its median absolute
deviation, and takes 30 iterations at most. In whitening, a variance below 1e-8 of the greatest counts as
that much.

Cost: one forward pass over the set, d^2 n multiplications for d features, and some 100 n k^2 in all. Memory:
the features of the largest class, and d^2 numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from unpoison._option_checks import check_options
from unpoison.detectors._estimates import Measured
from unpoison.detectors._findings import Findings
from unpoison.detectors._methods import register
from unpoison.detectors._representations import principal
from unpoison.detectors._search import Search, Searcher
from unpoison.detectors.spectral_signatures import beyond
from unpoison.errors import InputError, printable
from unpoison.influence import Parts
from unpoison.registry import Presets

_ROUNDS = 30


@final
@register(
    name="spectre",
    title="SPECTRE",
    summary="Flags the outliers of one class after whitening by the covariance of its clean part.",
    paper="Hayase et al. 2021, arXiv 2104.11315",
    cost="one forward pass",
    presets=("original",),
)
@dataclass(frozen=True, kw_only=True)
class Spectre(Searcher):
    """Flag the outliers of one class after whitening by the covariance of its clean part.

    Arguments:
        expected_share: eps, the share of the target class that may be poison, in (0, .5).
        multiplier: the multiple of that share that is flagged.
        alpha: how much weight the QUE score gives to the directions of the largest second moments; 0
            weighs all directions equally.
        max_dimensions: the largest k tried.
        module: the module whose input is read; the network's last layer by default.
        batch_size: images of a forward pass.
    """

    PRESETS: ClassVar[Presets] = {
        "original": {},
    }

    expected_share: float = 0.05
    multiplier: float = 1.5
    alpha: float = 4.0
    max_dimensions: int = 64
    module: str | None = None
    batch_size: int = 512

    def __post_init__(self) -> None:
        check_options(
            self.method.name,
            self,
            expected_share="(0, 0.5)",
            multiplier="(0, inf)",
            alpha="[0, inf)",
            max_dimensions="[1, inf)",
            batch_size="[1, inf)",
        )
        if self.multiplier * self.expected_share >= 0.5:
            raise InputError(
                f"spectre: multiplier times expected_share must be below .5, found {self.multiplier} times "
                f"{self.expected_share}"
            )

    def memory_needed(self, measured: Measured) -> Parts:
        """See `Detector.memory_needed`."""
        return measured.by_class(self)

    def search(self, search: Search) -> Findings:
        """See the module's docstring."""
        reader = search.reader(self.module, self.batch_size)
        training_set = search.training_set
        raw = torch.zeros(len(training_set), dtype=torch.float64)
        scores, strengths = raw.clone(), raw.clone()
        target, strongest = -1, 0.0
        for one in reader.by_class():
            own, strength = self._class_scores(one.values)
            raw[one.indices], strengths[one.indices] = own.cpu(), strength
            scores[one.indices] = beyond(own, self._removed(len(own))).cpu()
            if strength > strongest:
                target, strongest = one.label, strength
        # In all other classes nothing is above the threshold, and weaker classes score lower.
        elsewhere = training_set.labels.cpu() != target
        scores[elsewhere] = scores[elsewhere].clamp(max=1) * (strengths / max(strongest, 1e-300))[elsewhere]
        name = printable(training_set.class_names[target]) if target >= 0 else "none"
        return search.findings(
            scores=scores,
            threshold=1.0,
            how=f"the {100 * self.multiplier * self.expected_share:g} % with the highest scores of the class "
            f"with the strongest signature, {name}; {100 * self.expected_share:g} % of it may be poison",
            words="score highest in the class with the strongest signature; as many do without poison",
            evidence={"que": raw, "class_strength": strengths},
        )

    def _removed(self, examples: int) -> int:
        return int(self.multiplier * self.expected_share * examples)

    def _class_scores(self, features: Tensor) -> tuple[Tensor, float]:
        """Float64[n] QUE scores of Float[n d] `features` for the best k, and how strong they are."""
        n = len(features)
        centred = features.double() - features.double().mean(0)
        variances, directions = principal(centred, self.max_dimensions)
        points = centred @ directions / variances.sqrt()  # the scale cancels; this one keeps it in range
        best, strength = points.new_zeros(n), 0.0
        removed, most = self._removed(n), min(len(variances), n // 8)
        for k in (root * root for root in range(1, 1 + int(self.max_dimensions**0.5))):
            if removed < 1 or k > most:
                break
            part = points[:, :k]
            scores, _ = que_scores(part, whitening_set(part, n - removed), self.alpha)
            kept = scores.argsort(stable=True)[: n - removed]
            _, mean = que_scores(part, kept, self.alpha)
            if mean > strength:
                best, strength = scores, mean
        return best, strength


def whitening_set(points: Tensor, count: int) -> Tensor:
    """Int64[count]: the rows of Float[n k] nearest to their own mean in the metric of their own covariance.

    The minimum covariance determinant by concentration steps, from the rows nearest to the median.
    """
    spread = (points - points.median(0).values).abs().median(0).values
    distance = ((points - points.median(0).values) / torch.where(spread > 0, spread, 1.0)).square().sum(1)
    chosen = distance.argsort(stable=True)[:count]
    for _ in range(_ROUNDS):
        distance = _whitened(points, chosen).square().sum(1)
        following = distance.argsort(stable=True)[:count]
        if torch.equal(following.sort().values, chosen.sort().values):
            break
        chosen = following
    return chosen


def que_scores(points: Tensor, clean: Tensor, alpha: float) -> tuple[Tensor, float]:
    """QUE scores of Float[n k] `points`, whitened by the rows Int64[c] `clean`.

    Returns:
        Float64[n] h^T Q h / tr Q, and their mean, tr(S Q) / tr Q.
    """
    white = _whitened(points, clean)
    moment = white.t() @ white / len(white)
    values, vectors = torch.linalg.eigh(moment)
    norm = float(values[-1])
    # exp(alpha (S - I) / (|S| - 1)), times a factor that the trace takes out again.
    weights = ((values - norm) * (alpha / (norm - 1) if norm > 1 + 1e-9 else 0.0)).exp()
    weights = weights / weights.sum()
    scores = (white @ vectors).square() @ weights
    return scores, float(scores.mean())


def _whitened(points: Tensor, clean: Tensor) -> Tensor:
    chosen = points[clean]
    mean = chosen.mean(0)
    values, vectors = torch.linalg.eigh((chosen - mean).t() @ (chosen - mean) / len(chosen))
    # In a direction without variance of the clean examples any difference would be infinite.
    floor = values.amax().clamp(min=1e-300) * 1e-8
    white: Tensor = (points - mean) @ (vectors / torch.maximum(values, floor).sqrt())
    return white
