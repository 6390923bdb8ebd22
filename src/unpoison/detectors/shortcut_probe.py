"""Shortcut probe: availability poison is noticed by a linear model that predicts the training set too well.

Ours, on a finding of Yu, Zhang, Chen, Yin and Liu 2022, "Availability Attacks Create Shortcuts" (KDD; arXiv
2111.00898): the noise of availability poison is almost linearly separable by the labels. A linear model that
is trained on one half of such a set therefore predicts the other half much better than clean images, of which
it has learned little.

1. Cut the training set into two halves at random; fit a linear model of the pixels to the labels of each, by
   ridge regression.
2. Predict the second half, at most `held_out` examples of it, and the reference by the model of the first.
3. If the training set is as clean as the reference, the second half and the reference are exchangeable
   within each class, whatever the model has learned. So the number of right predictions in the second half
   has a known distribution, given all right predictions of the class: hypergeometric, and a sum of these over
   the classes. Poison is found where so many have a probability of at most `level`. The level is exact, or
   lower because the distribution is discrete; nothing is estimated.
4. The score of an example is the margin by which the model of the other half leads its label before all
   others. Where poison is found, examples are flagged whose margin is exceeded by at most `flag_level` of the
   reference.

Without a reference nothing can be judged. Images of more than `dimensions` numbers are thinned to every
second pixel, every third and so on; small shortcuts could be lost with the rest.

Limits: the reference must come from where the clean training set comes from: a test set of another origin is
found "poisoned" too. A backdoor, of which most of the set is free, is not found. The margins separate poison
from clean examples poorly where only a part is poisoned; the verdict is what the method is for.

Cost: two passes over the set, and 3 d^3 operations for d pixels. Memory: two matrices of d x d numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unpoison._option_checks import PositiveFloat, PositiveInt, check_options
from unpoison._seeds import generator
from unpoison.data import TrainingSet, as_training_set
from unpoison.detectors._estimates import Measured
from unpoison.detectors._findings import Findings
from unpoison.detectors._methods import register
from unpoison.detectors._search import Search, Searcher
from unpoison.errors import InputError
from unpoison.influence import Parts
from unpoison.registry import Presets


@final
@register(
    name="shortcut-probe",
    title="Shortcut probe",
    summary="Finds availability poison: a linear model predicts the training set better than clean images.",
    paper="ours, on Yu et al. 2022, arXiv 2111.00898",
    cost="two passes over the set, and a linear system as large as an image",
    presets=("default",),
    can_find_nothing=True,
    uses_reference=True,
)
@dataclass(frozen=True, kw_only=True)
class ShortcutProbe(Searcher):
    """Compare how well a linear model predicts held-out training examples and clean ones.

    Arguments:
        level: the false-alarm level of the verdict, in (0, 0.5].
        flag_level: the share of the reference whose margins may exceed the threshold, in (0, 0.5].
        held_out: how many held-out training examples and reference examples are compared, at most.
        ridge: the penalty of the linear model, in mean variances of a pixel; above 0.
        dimensions: the most numbers of an image that are read.
        batch_size: images of a pass.
    """

    PRESETS: ClassVar[Presets] = {"default": {}}

    level: Annotated[float, "(0, 0.5]"] = 0.01
    flag_level: Annotated[float, "(0, 0.5]"] = 0.05
    held_out: PositiveInt = 2000
    ridge: PositiveFloat = 0.1
    dimensions: PositiveInt = 4096
    batch_size: PositiveInt = 512

    def __post_init__(self) -> None:
        check_options(self.method.name, self)

    def memory_needed(self, measured: Measured) -> Parts:
        """See `Detector.memory_needed`."""
        numbers = min(measured.numbers, self.dimensions)
        batch = min(self.batch_size, measured.examples)
        return {"matrices": 8 * 4 * numbers**2, "images": 3 * 8 * batch * numbers}

    def search(self, search: Search) -> Findings:
        """See the module's docstring; of the model only the device is used."""
        training_set = search.pictures
        draws = generator(search.seed, "shortcut probe", "halves")
        order = torch.randperm(len(training_set), generator=draws)
        second = torch.zeros(len(training_set), dtype=torch.bool)
        second[order[len(order) // 2 :]] = True
        probes = self._fitted(search, training_set, second)
        margins = torch.zeros(len(training_set), dtype=torch.float64)
        for start, outputs, labels in self._predicted(search, training_set, probes):
            found = margins_of(outputs, labels)  # of both models, [2 b]
            of_other = torch.where(second[start : start + len(labels)], found[0], found[1])
            margins[start : start + len(labels)] = of_other
        if search.reference is None:
            return replace(
                self._findings(search, margins, float(margins.max())),
                summary="Cannot be judged: the shortcut probe compares with clean examples; give a reference",
            )
        reference = self._reference(search, training_set, draws)
        parts = [
            margins_of(outputs, labels)[0]
            for _, outputs, labels in self._predicted(search, reference, probes[:1], stage="reference")
        ]
        clean = torch.cat(parts)
        drawn = order[len(order) // 2 :][: self.held_out]
        p_value = chance_of_so_many(
            margins[drawn] > 0, training_set.labels.cpu()[drawn], clean > 0, reference.labels.cpu()
        )
        threshold = float(margins.max())
        if p_value <= self.level:
            # The second largest of 39, say: at most `flag_level` of the reference lies above.
            above = math.floor(self.flag_level * len(clean))
            limit = float(clean.sort(descending=True).values[above])
            threshold = min(limit, math.nextafter(threshold, -math.inf))
        rates = [100 * float((one > 0).double().mean()) for one in (margins[drawn], clean)]
        words = (
            f"a linear model predicts {rates[0]:.1f} % of held-out training examples and {rates[1]:.1f} % of"
        )
        findings = self._findings(search, margins, threshold)
        summary = f"{findings.summary}: {words} the reference (p = {p_value:.2g})"
        return replace(findings, p_value=p_value, summary=summary)

    def _findings(self, search: Search, margins: Tensor, threshold: float) -> Findings:
        return search.findings(
            scores=margins,
            threshold=threshold,
            how=f"at most {100 * self.flag_level:g} % of the reference lies above, where the verdict is that "
            f"there is poison at level {self.level:g}; else nothing does",
            words="are predicted too well by a linear model",
        )

    def _reference(self, search: Search, training_set: TrainingSet, draws: torch.Generator) -> TrainingSet:
        assert search.reference is not None
        reference = as_training_set(search.reference)
        if reference.image_shape != training_set.image_shape or not len(reference):
            raise InputError(
                f"{reference.name}: a reference needs images of shape {training_set.image_shape}, "
                f"found {len(reference)} of shape {reference.image_shape}"
            )
        if reference.num_classes != training_set.num_classes:
            raise InputError(
                f"{reference.name}: a reference needs {training_set.num_classes} classes, "
                f"found {reference.num_classes}"
            )
        chosen = torch.randperm(len(reference), generator=draws)[: self.held_out]
        return reference.subset(chosen.sort().values)

    def _fitted(self, search: Search, training_set: TrainingSet, second: Tensor) -> Tensor:
        """Float64[2 d+1 classes]: the linear models of the first half and of the second."""
        size, classes = self._numbers(training_set) + 1, training_set.num_classes
        options = {"dtype": torch.float64, "device": search.device}
        squares = torch.zeros(2, size, size, **options)  # type: ignore[call-overload]
        products = torch.zeros(2, size, classes, **options)  # type: ignore[call-overload]
        for start, numbers, labels in self._batches(search, training_set, "fit"):
            wanted = torch.nn.functional.one_hot(labels, classes).double()
            halves = second[start : start + len(labels)].to(search.device)
            for half, member in enumerate((~halves, halves)):
                squares[half] += numbers[member].t() @ numbers[member]
                products[half] += numbers[member].t() @ wanted[member]
        diagonal = squares.diagonal(dim1=1, dim2=2)
        # The last number is the constant 1, which is hardly penalised.
        penalty = self.ridge * diagonal[:, :-1].mean(1, keepdim=True).expand(-1, size).clone() + 1e-9
        penalty[:, -1] = 1e-6
        diagonal += penalty
        solved: Tensor = torch.linalg.solve(squares, products)
        return solved

    def _predicted(
        self, search: Search, examples: TrainingSet, probes: Tensor, stage: str = "scores"
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Where a batch begins, Float64[m b classes] outputs of the models, and Int64[b]; on the CPU."""
        for start, numbers, labels in self._batches(search, examples, stage):
            yield start, (numbers @ probes).cpu(), labels.cpu()

    def _batches(
        self, search: Search, examples: TrainingSet, stage: str
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Where a batch begins, Float64[b d+1] with a constant 1 at the end, and Int64[b]."""
        step = self._step(examples)
        for start in range(0, len(examples), self.batch_size):
            rows = slice(start, start + self.batch_size)
            images = (
                examples.images[rows, :, ::step, ::step].to(search.device).flatten(1).double() / 255 - 0.5
            )
            ones = images.new_ones(len(images), 1)
            yield start, torch.cat((images, ones), 1), examples.labels[rows].to(search.device)
            if search.progress is not None:
                search.progress(stage, min(start + self.batch_size, len(examples)), len(examples))

    def _step(self, examples: TrainingSet) -> int:
        """Every how many pixels are read each way."""
        step = 1
        while self._thinned(examples, step) > self.dimensions:
            step += 1
        return step

    def _numbers(self, examples: TrainingSet) -> int:
        return self._thinned(examples, self._step(examples))

    def _thinned(self, examples: TrainingSet, step: int) -> int:
        channels, height, width = examples.image_shape
        return channels * -(-height // step) * -(-width // step)


def margins_of(outputs: Tensor, labels: Tensor) -> Tensor:
    """Float[... b]: the output of the label minus the greatest other; 0 where there is one class.

    Arguments:
        outputs: Float[... b classes].
        labels: Int64[b].

    >>> margins_of(torch.tensor([[1.0, 4.0, 2.0]]), torch.tensor([1])).tolist()
    [2.0]
    """
    if outputs.shape[-1] < 2:
        return torch.zeros_like(outputs[..., 0])
    chosen = torch.nn.functional.one_hot(labels, outputs.shape[-1]).bool()
    own = outputs.masked_fill(~chosen, -torch.inf).amax(-1)
    return own - outputs.masked_fill(chosen, -torch.inf).amax(-1)


def chance_of_so_many(hits: Tensor, labels: Tensor, other_hits: Tensor, other_labels: Tensor) -> float:
    """How probable so many hits or more are among the first examples, if both are exchangeable in each class.

    Arguments:
        hits: Bool[n].
        labels: Int64[n], their classes.
        other_hits: Bool[m].
        other_labels: Int64[m].

    >>> of_class = torch.zeros(3, dtype=torch.int64)
    >>> round(chance_of_so_many(torch.ones(3).bool(), of_class, torch.zeros(3).bool(), of_class), 9)
    0.05
    """
    distribution, least = np.ones(1), 0
    for label in torch.cat((labels, other_labels)).unique().tolist():  # type: ignore[no-untyped-call]
        own, others = hits[labels == label], other_hits[other_labels == label]
        total = int(own.sum() + others.sum())
        first = max(0, total - len(others))
        distribution = np.convolve(distribution, _hypergeometric(len(own), len(others), total))
        least += first
    return float(min(1.0, max(1e-300, distribution[int(hits.sum()) - least :].sum())))


def _hypergeometric(first: int, second: int, total: int) -> NDArray[np.float64]:
    """The probabilities of each possible count among `first`, of `total` drawn from `first` + `second`."""

    def choose(n: int, k: int) -> float:
        return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)

    counts = range(max(0, total - second), min(first, total) + 1)
    logs = [choose(first, k) + choose(second, total - k) - choose(first + second, total) for k in counts]
    found: NDArray[np.float64] = np.exp(np.array(logs))
    return found
