"""`Searcher`: what most detectors have in common, from the arguments of `find` to `Findings`.

A detector that derives from `Searcher` implements `search`, which gets a `Search`: the checked arguments and,
on request, a reader of features, the factors of the influence engine and influence scores. `Search.findings`
turns a score for every example and a threshold into `Findings`.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from functools import cached_property
from typing import Any, Final, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unpoison._memory import peak_bytes
from unpoison._progress import Progress
from unpoison._seeds import derive_seed
from unpoison.data import Examples, Inputs, TrainingSet, as_training_set
from unpoison.detectors._checks import check_index, check_outputs
from unpoison.detectors._detector import Detector
from unpoison.detectors._findings import Findings, Threshold
from unpoison.detectors._observation import Observation, check_observation
from unpoison.detectors._representations import Reader
from unpoison.errors import InputError, printable
from unpoison.influence import (
    Coverage,
    Damping,
    Factors,
    InfluenceIndex,
    Scores,
    coverage,
    fit_factors,
    influence_scores,
)
from unpoison.tasks import ClassificationTask

REFINED: Final = 1000
"""How many examples are scored again, exactly, where an index is used."""
OF_INFLUENCE: Final = dict.fromkeys(("covariance_examples", "eigenvalue_examples", "batch_size"), "[1, inf)")
"""The ranges of the numbers that every detector by influence has, for `check_options`."""
_TOLD_BELOW: Final = 0.9
"""The share of tracked parameters below which the summary says what is not tracked."""


class Searcher(Detector):
    """A detector that scores every example and flags those above a threshold."""

    def find(
        self,
        model: nn.Module,
        training_set: Examples,
        observation: Observation | None = None,
        *,
        reference: Examples | None = None,
        seed: int = 0,
        progress: Progress | None = None,
        factors: Factors | None = None,
        index: InfluenceIndex | None = None,
        refine: int = REFINED,
    ) -> Findings:
        """See `Detector.find`.

        Arguments:
            factors: EK-FAC factors fitted to this model and training set, for detectors by influence, which
                fit them anew by default.
            index: of this model and training set, for detectors that can read influences from one.
            refine: with an index, how many of the examples that it ranks first are scored again, exactly.

        Raises:
            MismatchError: the factors or the index are of another model or other examples.
        """
        if self.method.needs_observation:
            observation = check_observation(model, training_set, observation)
        elif not len(training_set):
            raise InputError(f"{training_set.name}: there are no training examples to search")
        else:
            observation = None
            check_outputs(model, training_set)
        search = Search(
            self, model, training_set, observation, reference, seed, progress, factors, index, refine
        )
        return search.finished(self.search(search))

    @abstractmethod
    def search(self, search: Search) -> Findings:
        """Find the examples that are responsible; the seconds and the memory are added by `find`."""


@final
class Search:
    """One call of `find`, see there for the arguments. The observation is checked, if the detector needs one.

    Detectors by influence have the fields `damping`, `modules`, `covariance_examples`,
    `eigenvalue_examples` and `batch_size`.
    """

    def __init__(
        self,
        detector: Detector,
        model: nn.Module,
        training_set: Examples,
        observation: Observation | None,
        reference: Examples | None,
        seed: int,
        progress: Progress | None,
        factors: Factors | None,
        index: InfluenceIndex | None = None,
        refine: int = 0,
    ) -> None:
        if index is not None:
            check_index(detector, model, training_set, index, refine)
            factors = index.factors
        elif factors is not None:
            factors.check(model, training_set)
        self._detector: Any = detector
        self._factors, self._observation = factors, observation
        self.index, self.refined = index, 0
        self.refine = 0 if index is not None and index.exact else refine
        self.model, self.training_set, self.reference = model, training_set, reference
        self.seed, self.progress = seed, progress
        tensors = (*model.parameters(), *model.buffers())
        self.device = next((tensor.device for tensor in tensors), training_set.device)
        self.coverage: Coverage | None = None
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    @property
    def observation(self) -> Observation:
        """The observation of a detector that needs one."""
        assert self._observation is not None
        return self._observation

    @property
    def answer(self) -> int:
        """The wrong label."""
        return self.observation.answer

    @property
    def answer_name(self) -> str:
        """The name of the wrong label."""
        return printable(self.training_set.class_names[self.answer])

    @cached_property
    def pictures(self) -> TrainingSet:
        """The training set as 8-bit images, for detectors that look at pixels.

        Raises:
            InputError: it has others.
        """
        try:
            return as_training_set(self.training_set)
        except InputError as error:
            raise InputError(f"{self._detector.method.name}: works on 8-bit images alone; {error}") from None

    @property
    def clean(self) -> Examples:
        """What is taken for clean: the reference, or else the training set, most of which is.

        Raises:
            InputError: the reference has no examples, or such as the training set has not.
        """
        if self.reference is None:
            return self.training_set
        if not len(self.reference):
            raise InputError(f"{self.reference.name}: the reference has no examples; leave it out")
        own, given = ((one.input_shape, one.num_classes) for one in (self.training_set, self.reference))
        if given != own:
            raise InputError(
                f"{self.reference.name}: a reference needs inputs of shape {own[0]} in {own[1]} classes, "
                f"found {given[0]} in {given[1]}"
            )
        return self.reference

    def lap(self, stage: str) -> None:
        """Count the time since the last call for the stage."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now

    def finished(self, findings: Findings) -> Findings:
        """The findings with the seconds by stage and the memory."""
        self.lap("scores")
        return replace(findings, seconds=self.seconds, peak_bytes=peak_bytes(self.device))

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the detector as JSON values."""
        return settings_of(self._detector)

    @property
    def damping(self) -> Damping:
        """The damping of a detector by influence."""
        damping: Damping = self._detector.damping
        return damping

    @property
    def batch_size(self) -> int:
        """The batch size of a detector by influence."""
        return int(self._detector.batch_size)

    def reader(self, module: str | None, batch_size: int) -> Reader:
        """A reader of features of the training set, see there."""
        return Reader(
            self.model, self.training_set, module=module, batch_size=batch_size, progress=self.progress
        )

    @cached_property
    def factors(self) -> Factors:
        """The factors that were given, or those fitted anew."""
        if self._factors is not None:
            self.coverage = coverage(self.model, list(self._factors.layers))
            return self._factors
        factors = fit_factors(
            self.model,
            self.training_set,
            ClassificationTask(),
            seed=derive_seed(self.seed, "factors"),
            modules=self._detector.modules,
            covariance_examples=self._detector.covariance_examples,
            eigenvalue_examples=self._detector.eigenvalue_examples,
            batch_size=self._detector.batch_size,
            progress=self.progress,
        )
        self.coverage = coverage(self.model, list(factors.layers))
        self.lap("factors")
        return factors

    def influence(
        self,
        inputs: Inputs,
        labels: Tensor,
        *,
        combine: Tensor | None = None,
        examples: Examples | None = None,
        gradient: Literal["loss", "measurement"] = "loss",
        self_influence: bool = False,
        ranking: Callable[[Tensor], Tensor] | None = None,
        stage: str = "scores",
    ) -> Scores:
        """The influence of training examples on the margins of labels at inputs.

        Arguments:
            inputs: q inputs as the model takes them.
            labels: Int64[q].
            combine: Float[m, q], the combinations of margins to score; see `unpoison.influence.precondition`.
            examples: those to score; the training set by default.
            gradient: see `unpoison.influence.score`, like the rest.
            self_influence: also give each example's influence on itself.
            ranking: with an index, Float[n] of Float[m n]: examples with the highest are scored again,
                exactly; the sum by default.
            stage: whose time it is.

        Returns:
            Float[m n] values, among others, on the device of the model.
        """
        detector, task = self._detector, ClassificationTask()
        if self.index is not None and examples is None:
            return self._indexed(self.index, inputs, labels, combine, gradient, self_influence, ranking)
        scores = influence_scores(
            self.model,
            self.factors,
            (inputs, labels),
            self.training_set if examples is None else examples,
            task,
            combine=combine,
            damping=detector.damping,
            gradient=gradient,
            self_influence=self_influence,
            batch_size=detector.batch_size,
            progress=self.progress,
        )
        self.lap(stage)
        return scores

    def _indexed(
        self,
        index: InfluenceIndex,
        inputs: Inputs,
        labels: Tensor,
        combine: Tensor | None,
        gradient: Literal["loss", "measurement"],
        self_influence: bool,
        ranking: Callable[[Tensor], Tensor] | None,
    ) -> Scores:
        """Influences from the index, of which those that are ranked first are replaced by exact ones."""
        queries = index.queries(
            self.model,
            (inputs, labels),
            ClassificationTask(),
            combine=combine,
            damping=self.damping,
            batch_size=self.batch_size,
            progress=self.progress,
        )
        self.lap("queries")
        values, measured = index.influence(queries), index.values()
        own = index.self_influence if self_influence else None
        if gradient == "loss":  # the loss is softplus of the measurement
            values *= measured.sigmoid()
            own = None if own is None else own * measured.sigmoid().square()
        self.lap("scores")
        if self.refine:
            order = values.sum(0) if ranking is None else ranking(values)
            rows = order.topk(min(self.refine, len(order))).indices.sort().values
            exact = self.influence(
                inputs, labels, combine=combine, examples=self.training_set.subset(rows), gradient=gradient
            )
            values[:, rows] = exact.values.double().cpu()
            self.refined = len(rows)
        losses = F.softplus(measured) if gradient == "loss" else measured
        return Scores(values, losses, None, own)

    def influence_on_the_answer(self, **options: Any) -> Scores:
        """The influence on the margin of the answer, Float[1 n]; the mean where there are several images."""
        count = len(self.observation)
        inputs, labels = self.observation.inputs, torch.full((count,), self.answer)
        return self.influence(inputs, labels, combine=torch.full((1, count), 1 / count), **options)

    @property
    def index_settings(self) -> dict[str, Any]:
        """Of the configuration: the index that was used, and how many scores are exact."""
        if self.index is None:
            return {}
        return {"index": {**self.index.settings, "refined": self.refined}}

    def remarks(self) -> str:
        """What to say of an index, and of a network of which much is not tracked."""
        return self._of_index() + self._untracked()

    def _of_index(self) -> str:
        if self.index is None:
            return ""
        exact = f"; {self.refined} examples scored again exactly" if self.refined else ""
        return f". Read from an index of {self.index.numbers} numbers an example{exact}"

    def _untracked(self) -> str:
        if self.coverage is None or self.coverage.share >= _TOLD_BELOW:
            return ""
        names = self.coverage.untracked
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return (
            f". Measured on {100 * self.coverage.share:.2g} % of the model's parameters, without "
            f"{', '.join(names[:3])}{more}"
        )

    def findings(
        self,
        *,
        scores: Tensor,
        threshold: float,
        how: str,
        words: str,
        evidence: Mapping[str, Tensor] | None = None,
    ) -> Findings:
        """The findings that flag every example above the threshold.

        Arguments:
            scores: Float[n].
            threshold: examples with a higher score are flagged.
            how: how the threshold was chosen.
            words: what "3 of 100 training examples" do, such as "form a second group in their class".
            evidence: Float[n] columns by name.
        """
        scores, labels = scores.cpu(), self.training_set.labels.cpu()
        names, classes = self.training_set.class_names, self.training_set.num_classes
        flagged = (scores > threshold).nonzero()[:, 0]
        flagged = flagged[scores[flagged].argsort(descending=True, stable=True)]
        hit = torch.bincount(labels[flagged], minlength=classes).tolist()
        hit_names = [printable(name) for name, count in zip(names, hit, strict=True) if count]
        more = f" and {len(hit_names) - 3} more" if len(hit_names) > 3 else ""
        among = f" (in {', '.join(hit_names[:3])}{more})" if hit_names else ""
        return Findings(
            method=self._detector.method.name,
            configuration=self.settings | {"seed": self.seed} | self.index_settings,
            fingerprint=self.training_set.fingerprint,
            labels=labels,
            class_names=names,
            scores=scores,
            flagged=flagged,
            threshold=Threshold(threshold, how),
            poison_found=bool(len(flagged)),
            p_value=None,
            summary=f"{len(flagged)} of {len(scores)} training examples {words}{among}{self.remarks()}",
            evidence={name: column.cpu() for name, column in (evidence or {}).items()},
            observation=self._observation,
            ids=self.training_set.ids,
            tracked_share=None if self.coverage is None else self.coverage.share,
            untracked=() if self.coverage is None else self.coverage.untracked,
        )


def settings_of(configuration: Any) -> dict[str, Any]:
    """The fields of a dataclass as JSON values; a field that is a dataclass itself is given with its name.

    >>> from unpoison.detectors import EKFACThreshold
    >>> settings_of(EKFACThreshold())["damping"]
    {'name': 'RelativeDamping', 'share': 0.1}
    """
    settings: dict[str, Any] = {}
    for one in fields(configuration):
        value = getattr(configuration, one.name)
        if is_dataclass(value):
            value = {"name": type(value).__name__, **settings_of(value)}
        settings[one.name] = list(value) if isinstance(value, tuple) else value
    return settings
