"""Beatrix: the channels of an example with a trigger are correlated otherwise than those of its class.

Ma, Wang, Sun, Xu, Xue and Zhang, "The Beatrix Resurrections: Robust Backdoor Detection via Gram Matrices"
(NDSS 2023, arXiv 2209.11715). Made for triggers that differ from image to image. Stages, for each class:

1. Gram matrices of the orders p = 1, ..., 9 of an example's feature maps F, with a row for each channel:
   (F^p F^pT)^(1/p), powers and roots of entries, the upper triangle of each;
2. the median and the median absolute deviation of each entry over 30 clean examples of the class. An entry
   may be up to 10 deviations off the median; what lies beyond, relative to that bound, is added up over all
   entries: the deviation of the example;
3. examples with a greater deviation than 95 % of clean ones of the class are suspicious;
4. the distance of the suspicious from the other examples of the class, by the maximum mean discrepancy with a
   Gaussian kernel. A class is contaminated where it lies more than e^2 = 7.39 median absolute deviations
   above the median of all classes; its suspicious examples are flagged.

Clean examples are those of `reference`: 30 of a class, at random, for the bounds, and the others for the
95 %. Departures: without a reference (or with fewer than four examples of a class in it) both are taken from
the training set, whose medians a minority of poison hardly moves; of poison that is more than 5 % of its
class only so much is then flagged. The authors' code multiplies the discrepancy of m and n examples by
m n / (m + n), adds up two kernels, takes the orders 1 to 8 and reads what the last stage of a residual
network is given; here at most 500 examples of either group are compared by one kernel, as wide as the median
distance, without that factor. The constants are otherwise those of that code; e^2 is from the paper as we
remember it. Feature maps are the last output with a height and a width that the network has; where it has
none, the rows of the last output with three dimensions (tokens), and else single numbers, of which all orders
are alike.

Presets: `original` has the paper's constants; `modified-z`, ours, takes 3.5 deviations for a contaminated
class, the usual limit of modified z-scores (Iglewicz and Hoaglin, 1993).

With fewer than three classes that have examples nothing can be judged; the summary says so. A class with
fewer than four examples is passed over.

Cost: one forward pass over the set, and 9 c^2 h w multiplications an example for c channels. Memory:
9 c^2 / 2 numbers for each of 30 examples and of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, final

import torch
from torch import Tensor, nn

from unpoison._inputs import Inputs, placed
from unpoison._option_checks import check_options
from unpoison._seeds import generator
from unpoison.data import Examples
from unpoison.detectors._estimates import Measured
from unpoison.detectors._findings import Findings
from unpoison.detectors._methods import register
from unpoison.detectors._representations import last_module
from unpoison.detectors._search import Search, Searcher
from unpoison.detectors.statistical_contamination import anomaly
from unpoison.errors import InputError
from unpoison.influence import Parts
from unpoison.models import FeatureTap, device_of, forward, preserved, usual_mode
from unpoison.registry import Presets

_FEWEST: Final = 4
_FEWEST_CLASSES: Final = 3
_COMPARED: Final = 500
_LEAST: Final = 1e-6


@final
@register(
    name="beatrix",
    title="Beatrix",
    summary="Flags examples whose Gram matrices are unusual, in classes where those form a group.",
    paper="Ma et al. 2023, arXiv 2209.11715",
    cost="one forward pass, and Gram matrices of nine orders",
    presets=("original", "modified-z"),
    can_find_nothing=True,
    uses_reference=True,
)
@dataclass(frozen=True, kw_only=True)
class Beatrix(Searcher):
    """Flag the examples of contaminated classes whose Gram matrices deviate from those of clean ones.

    Arguments:
        orders: the highest order of the Gram matrices.
        per_class: of how many clean examples of a class the bounds are made.
        width: of the bounds, in median absolute deviations.
        quantile: of the deviations of clean examples, beyond which an example is suspicious, in (0, 1).
        threshold: of a class, in median absolute deviations above the median of all classes.
        module: the module whose output is read; see above for the default.
        batch_size: images of a forward pass.
    """

    PRESETS: ClassVar[Presets] = {"original": {}, "modified-z": {"threshold": 3.5}}

    orders: int = 9
    per_class: int = 30
    width: float = 10.0
    quantile: float = 0.95
    threshold: float = math.e**2
    module: str | None = None
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_options(
            self.method.name,
            self,
            orders="[1, 32]",
            per_class="[2, inf)",
            width="(0, inf)",
            quantile="(0, 1)",
            batch_size="[1, inf)",
        )

    def memory_needed(self, measured: Measured) -> Parts:
        """See `Detector.memory_needed`."""
        few = measured.training_set.subset([0])
        maps = _Maps(measured.model, few.at([0])[0], self.module)
        [one] = maps.of(few, torch.tensor([0]), 1)
        entries = self.orders * one.shape[1] * (one.shape[1] + 1) // 2
        batch = min(self.batch_size, measured.examples)
        return {
            "Gram matrices": 8 * entries * (2 * self.per_class + 4 * batch),
            "activations": measured.activations.reading(batch),
        }

    def search(self, search: Search) -> Findings:
        """See the module's docstring."""
        training_set = search.training_set
        labels, total = training_set.labels.cpu(), len(training_set)
        maps = _Maps(search.model, training_set.at([0])[0], self.module)
        ratios = torch.zeros(total, dtype=torch.float64)
        distances: dict[int, float] = {}
        done = 0
        for label in sorted(set(labels.tolist())):
            own = (labels == label).nonzero()[:, 0]
            done += len(own)
            if len(own) >= _FEWEST:
                ratio, means = self._deviations(search, maps, label, own)
                ratios[own] = ratio
                distances[label] = discrepancy(means[ratio > 1], means[ratio <= 1])
            if search.progress is not None:
                search.progress("features", done, total)
        of_class = torch.zeros(training_set.num_classes, dtype=torch.float64)
        for label, value in anomaly(distances).items():
            of_class[label] = value
        scores = ratios / (1 + ratios)
        contaminated = (of_class > self.threshold)[labels]
        findings = search.findings(
            scores=torch.where(contaminated, scores, scores - 1),
            threshold=0.5,
            how=f"deviation above that of {100 * self.quantile:g} % of clean examples, in a class whose "
            f"suspicious examples lie more than {self.threshold:.2f} median absolute deviations farther off "
            "than those of others",
            words="have unusual Gram matrices and form a group in their class",
            evidence={"deviation": ratios, "anomaly": of_class[labels]},
        )
        if len(distances) < _FEWEST_CLASSES:
            findings = replace(
                findings,
                summary=f"Cannot be judged: Beatrix compares classes and needs {_FEWEST_CLASSES} or more "
                f"with {_FEWEST} examples; there are {len(distances)}. Scan with another method, such as "
                "activation-clustering",
            )
        return findings

    def _deviations(self, search: Search, maps: _Maps, label: int, own: Tensor) -> tuple[Tensor, Tensor]:
        """Float64[m] deviations of the examples of a class, in units of the limit, and Float64[m c] means."""
        clean, known = search.training_set, own
        if search.reference is not None:
            found = (search.clean.labels.cpu() == label).nonzero()[:, 0]
            if len(found) >= _FEWEST:
                clean, known = search.clean, found
        order = torch.randperm(len(known), generator=generator(search.seed, "beatrix", label))
        count = min(self.per_class, len(known) // 2)
        inside, others = known[order[:count]], known[order[count:]]
        grams = torch.cat([self._grams(one) for one in maps.of(clean, inside.sort().values, self.batch_size)])
        bounds = _Bounds.of(grams, self.width)
        means, off = [], []
        for one in maps.of(search.training_set, own, self.batch_size):
            off.append(bounds.deviation(self._grams(one)))
            means.append(one.mean(2).cpu())
        deviations = torch.cat(off)
        if clean is search.training_set:
            compared = deviations[torch.isin(own, others)]
        else:
            rows = maps.of(clean, others.sort().values, self.batch_size)
            compared = torch.cat([bounds.deviation(self._grams(one)) for one in rows])
        return deviations / compared.quantile(self.quantile).clamp(min=_LEAST), torch.cat(means)

    def _grams(self, maps: Tensor) -> Tensor:
        return gram_matrices(maps, self.orders)


def gram_matrices(maps: Tensor, orders: int) -> Tensor:
    """Float64[b orders * c (c + 1) / 2]: the upper triangles of Gram matrices of Float[b c l] feature maps.

    The order p is the p-th root of the products of p-th powers; a root keeps the sign.

    >>> gram_matrices(torch.tensor([[[1.0, 2.0], [0.0, 3.0]]]), 1)
    tensor([[5., 6., 9.]], dtype=torch.float64)
    """
    exact, channels = maps.double(), maps.shape[1]
    upper = torch.triu_indices(channels, channels, device=maps.device)
    parts = []
    for order in range(1, orders + 1):
        powers = exact.pow(order)
        gram = (powers @ powers.transpose(1, 2))[:, upper[0], upper[1]]
        parts.append(gram.sign() * gram.abs().pow(1 / order))
    return torch.cat(parts, 1)


@final
@dataclass(frozen=True, eq=False)
class _Bounds:
    """Between which the entries of clean examples lie, Float64[e] each."""

    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, grams: Tensor, width: float) -> _Bounds:
        """From Float64[k e] of clean examples."""
        middle = grams.quantile(0.5, dim=0)
        reach = width * (grams - middle).abs().quantile(0.5, dim=0)
        return cls(middle - reach, middle + reach)

    def deviation(self, grams: Tensor) -> Tensor:
        """Float64[b], on the CPU: what lies outside, relative to the bound, added up over Float64[b e]."""
        below = (self.low - grams).clamp(min=0) / (self.low.abs() + _LEAST)
        above = (grams - self.high).clamp(min=0) / (self.high.abs() + _LEAST)
        return (below + above).sum(1).cpu()


def discrepancy(first: Tensor, second: Tensor) -> float:
    """The squared maximum mean discrepancy of Float64[a c] and Float64[b c], with a Gaussian kernel.

    Its width is the median distance; at most 500 of each are compared, evenly chosen. 0 where there are none.

    >>> discrepancy(torch.zeros(3, 1), torch.zeros(2, 1))
    0.0
    """
    first, second = (
        one.double()[torch.linspace(0, len(one) - 1, min(len(one), _COMPARED)).long()]
        for one in (first, second)
    )
    if not len(first) or not len(second):
        return 0.0
    joint = torch.cat([first, second])
    squares = torch.cdist(joint, joint).square()
    middle = float(squares[squares > 0].median()) if bool((squares > 0).any()) else 1.0
    kernel, cut = (-squares / middle).exp(), len(first)
    within = kernel[:cut, :cut].mean() + kernel[cut:, cut:].mean()
    return max(0.0, float(within - 2 * kernel[:cut, cut:].mean()))


@final
class _Maps:
    """Reads the feature maps of examples.

    Arguments:
        model: any network.
        inputs: of one example.
        module: the module whose output is read; the last one that gives maps when None.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, module: str | None) -> None:
        self.model, self.device = model, device_of(model)
        self.side: Any = "output"
        if module is None:
            module = _last_with_maps(model, placed(inputs, self.device))
        if module is None:
            module, self.side = last_module(model, placed(inputs, self.device)), "input"
        self.module = module

    def of(self, examples: Examples, rows: Tensor, batch_size: int) -> Iterator[Tensor]:
        """Float32[b c l] of the examples at Int64[m] `rows`, batch by batch."""
        read = 0
        for inputs, *_ in examples.in_batches(batch_size, rows):
            with (
                usual_mode(self.device),
                preserved(self.model),
                torch.no_grad(),
                FeatureTap(self.model, self.module, side=self.side) as tap,
            ):
                forward(self.model, placed(inputs, self.device))
                maps = _as_maps(tap.value.detach()).float()
            if not bool(torch.isfinite(maps).all()):
                row = int((~torch.isfinite(maps)).flatten(1).any(1).nonzero()[0])
                raise InputError(
                    f"{examples.name}: the features of example {int(rows[read + row])} at module "
                    f"{self.module!r} are not finite numbers; train the model anew or name another module"
                )
            read += len(maps)
            yield maps


def _as_maps(value: Tensor) -> Tensor:
    """Channels by positions: [b c h w] and more dimensions, tokens [b t c], or single numbers [b c]."""
    if value.ndim == 3:
        return value.transpose(1, 2)
    return value.flatten(2) if value.ndim > 3 else value.reshape(len(value), -1, 1)


def _last_with_maps(model: nn.Module, inputs: Inputs) -> str | None:
    """The path of the last module that is called whose output has positions; None where none has."""
    called: list[str] = []
    with usual_mode(device_of(model)), preserved(model), torch.no_grad():
        for name, module in model.named_modules():

            def note(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
                if isinstance(output, Tensor) and output.ndim > 2 and _as_maps(output).shape[2] > 1:
                    called.append(name)

            module.register_forward_hook(note)
        with torch.compiler.set_stance("force_eager"):
            forward(model, inputs)
    return called[-1] if called else None
