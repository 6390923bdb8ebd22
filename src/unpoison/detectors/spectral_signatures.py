"""Spectral signatures: the poison of a class is far out along the direction of its largest variance.

Tran, Li and Madry, "Spectral Signatures in Backdoor Attacks" (NeurIPS 2018, arXiv 1811.00636). For each
class:

1. R: the features of its examples (the input of the network's last layer) minus their mean;
2. v: the top right singular vector of R;
3. score of an example with centred features r: (r . v)^2;
4. the 1.5 eps of the class with the highest scores are removed, eps being the share of it that may be poison.

The paper poisons 5 or 10 % of the target's images and takes eps as known; here it is the option
`expected_share`, .05 by default. The method does not decide whether there is any poison: as many examples are
flagged in every class of a clean set. Scores are divided by the highest score that is kept in the class, so
that classes can be compared; everything above 1 is flagged.

The preset `comparison` is what the published comparison with Delta-Influence used (notebooks of arXiv
2411.13731): ONE uncentred singular value decomposition of the features of the whole set, the right singular
vectors with singular values above 7, and every example flagged whose features have a norm above 7 in their
span. Both numbers are absolute and depend on the network.

Cost: one forward pass over the set (two for `comparison`), and d^2 n multiplications for d features. Memory:
the features of the largest class (a batch for `comparison`), and d^2 numbers.
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
from unpoison.detectors._representations import Reader, principal
from unpoison.detectors._search import Search, Searcher
from unpoison.influence import Parts
from unpoison.registry import Presets


@final
@register(
    name="spectral-signatures",
    title="Spectral signatures",
    summary="Flags the examples of each class farthest along its direction of largest variance.",
    paper="Tran, Li and Madry 2018, arXiv 1811.00636",
    cost="one forward pass",
    presets=("original", "comparison"),
)
@dataclass(frozen=True, kw_only=True)
class SpectralSignatures(Searcher):
    """Flag the examples of each class that lie farthest along its direction of largest variance.

    Arguments:
        expected_share: eps, the share of a class that may be poison, in (0, 1).
        multiplier: the multiple of that share that is flagged.
        thresholds: (singular value, norm) for the whole set at once, in place of shares of each class; see
            the preset `comparison`.
        module: the module whose input is read; the network's last layer by default.
        batch_size: images of a forward pass.

    >>> from unpoison import detectors
    >>> detectors.get("spectral-signatures", preset="comparison").thresholds
    (7.0, 7.0)
    """

    PRESETS: ClassVar[Presets] = {
        "original": {},
        "comparison": {"thresholds": (7.0, 7.0)},
    }

    expected_share: float = 0.05
    multiplier: float = 1.5
    thresholds: tuple[float, float] | None = None
    module: str | None = None
    batch_size: int = 512

    def __post_init__(self) -> None:
        check_options(
            self.method.name, self, expected_share="(0, 1)", multiplier="(0, inf)", batch_size="[1, inf)"
        )

    def memory_needed(self, measured: Measured) -> Parts:
        """See `Detector.memory_needed`."""
        return measured.by_class(self)

    def search(self, search: Search) -> Findings:
        """See the module's docstring."""
        reader = search.reader(self.module, self.batch_size)
        if self.thresholds is not None:
            least, threshold = self.thresholds
            norms = _norms_of_the_whole_set(reader, least)
            return search.findings(
                scores=norms,
                threshold=threshold,
                how=f"norm in the span of all singular vectors with values above {least:g}; given in advance",
                words=f"have a norm above {threshold:g} there",
                evidence={"signature": norms},
            )
        raw = torch.zeros(len(reader.training_set), dtype=torch.float64)
        scores = raw.clone()
        for one in reader.by_class():
            own = spectral_scores(one.values).cpu()
            raw[one.indices] = own
            scores[one.indices] = beyond(own, int(self.multiplier * self.expected_share * len(own)))
        return search.findings(
            scores=scores,
            threshold=1.0,
            how=f"the {100 * self.multiplier * self.expected_share:g} % of each class that score highest; "
            f"{100 * self.expected_share:g} % of a class may be poison",
            words="score highest in their classes; as many do where there is no poison",
            evidence={"signature": raw},
        )


def spectral_scores(features: Tensor) -> Tensor:
    """Float64[n]: the squared projection of each row of Float[n d], centred, on the top singular vector.

    >>> spectral_scores(torch.tensor([[0.0, 0.0], [2.0, 0.0], [4.0, 0.0]]))
    tensor([4., 0., 4.], dtype=torch.float64)
    """
    centred = features.double() - features.double().mean(0)
    _, directions = principal(centred, 1)
    return (centred @ directions).square().sum(1)


def _norms_of_the_whole_set(reader: Reader, least: float) -> Tensor:
    """Float64[n]: norms in the span of the uncentred set's singular vectors with values above `least`."""
    gram: Tensor | None = None
    for _, values in reader.in_order():
        exact = values.double()
        part = exact.t() @ exact
        gram = part if gram is None else gram.add_(part)
    assert gram is not None
    squares, directions = torch.linalg.eigh(gram)
    kept = directions[:, squares.clamp(min=0).sqrt() > least]
    rows = [torch.linalg.vector_norm(values.double() @ kept, dim=1).cpu() for _, values in reader.in_order()]
    return torch.cat(rows)


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
