"""`InputDetector`: the interface of every method that says whether one input bears a trigger.

A test-time detector (input-level backdoor detection) looks at what a trained model makes of an input, and
knows neither the training set nor the trigger. Stages, the same for all:

1. `reference`, clean labelled examples that were not trained on, is split at random: at most `learns` of
   them, and no more than half, are what the method learns from; all others are scored as the inputs are;
2. the p-value of an input is its rank among those, (1 + how many score at least as high) / (m + 1), which for
   a clean input is uniform whatever the method's score (a conformal p-value; Vovk, Gammerman and Shafer,
   2005);
3. inputs with a p-value up to the false-positive rate are flagged. A rate r takes m >= 1 / r - 1 examples;
   with fewer the request is refused, since nothing could be flagged.

Among several inputs that are screened at once the rate holds for each.

Memory: a batch of inputs, and what the method keeps of the reference.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Final, final

import torch
from torch import Tensor, nn

from unpoison._inputs import Inputs, placed
from unpoison._memory import check_memory, peak_bytes
from unpoison._option_checks import CheckedOptions
from unpoison._progress import Progress
from unpoison._seeds import as_seed, generator
from unpoison.data import Examples
from unpoison.errors import InputError, MismatchError
from unpoison.input_detectors._screening import Screening
from unpoison.models import activations_of, device_of, logits_of, preserved, usual_mode
from unpoison.registry import Method

Scorer = Callable[[Inputs, Tensor], Tensor]
"""From the inputs of a batch, on the model's device, and Int64[b], what the model predicts for them, to
Float[b] scores; a higher score is stronger evidence of a trigger."""
RATE: Final = 0.05
"""The false-positive rate when none is given."""


@final
@dataclass(frozen=True, eq=False)
class Request:
    """What a method learns from: see `InputDetector.screen`.

    Arguments:
        model: in eval mode; hooks that are set are removed in the end.
        reference: the part of the clean examples that the method may learn from.
        seed: of everything random.
    """

    model: nn.Module
    reference: Examples
    seed: int

    @cached_property
    def device(self) -> torch.device:
        """Where the model lies."""
        return device_of(self.model)

    def logits(self, inputs: Inputs) -> Tensor:
        """Float64[b classes], on the device of the model.

        Raises:
            InputError: one of them is not finite.
        """
        logits = logits_of(self.model, inputs).double()
        if not bool(torch.isfinite(logits).all()):
            raise InputError("screen: the model gives logits that are not finite numbers; train it anew")
        return logits

    def pixels(self, inputs: Inputs, method: str) -> Tensor:
        """The inputs, as images.

        Raises:
            InputError: they are no images in [0, 1].
        """
        if isinstance(inputs, Mapping) or inputs.ndim != 4:
            raise InputError(f"{method}: changes pixels and works on images alone; ibd-psc takes any inputs")
        if not bool(((inputs >= 0) & (inputs <= 1)).all()):
            raise InputError(
                f"{method}: changes pixels and takes images in [0, 1]; say by normalization= how these were "
                "standardised"
            )
        return inputs


class InputDetector(CheckedOptions, ABC):
    """Says of single inputs whether they bear a trigger, by what a model makes of them.

    A frozen configuration; `screen` changes neither the model nor the examples. Each has an option
    `batch_size`: inputs of a forward pass.
    """

    method: ClassVar[Method]

    @property
    def learns(self) -> int:
        """How many clean examples the method wants to learn from, beside those that it is calibrated on."""
        return 0

    @property
    def keeps(self) -> int:
        """How many of them are held in memory at once."""
        return self.learns

    @property
    def fixed_threshold(self) -> float | None:
        """A published threshold in place of the calibrated one."""
        return None

    @abstractmethod
    def prepare(self, request: Request) -> Scorer:
        """Learn from the reference, and return what scores inputs."""

    def screen(
        self,
        model: nn.Module,
        inputs: Examples,
        *,
        reference: Examples,
        false_positive_rate: float = RATE,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Screening:
        """Score inputs, and flag those that look triggered.

        Arguments:
            model: takes a batch of inputs, such as Float[b c h w] in [0, 1]; returns Float[b classes] logits.
            inputs: to screen; their labels are not looked at.
            reference: labelled examples that are known to be clean and that the model was not trained on.
            false_positive_rate: the share of clean inputs that may be flagged, in (0, 1).
            seed: of everything random.
            progress: called with "calibration" and "screening", examples done and examples to do.

        Raises:
            InputError: there are no inputs, the reference has too few examples for the rate, or the model
                gives numbers that are not finite.
            MismatchError: the inputs are of another shape than the reference.
            InsufficientMemoryError: a batch does not fit.
        """
        began, seed = time.perf_counter(), as_seed(seed)
        _check(inputs, reference, false_positive_rate)
        order = torch.randperm(len(reference), generator=generator(seed, "screen", "reference"))
        learned = min(self.learns, len(reference) // 2)
        allowed = int(false_positive_rate * (len(reference) - learned + 1) + 1e-9)
        if self.fixed_threshold is None and allowed < 1:
            raise InputError(
                f"{reference.name}: a false-positive rate of {false_positive_rate:g} takes "
                f"{int(1 / false_positive_rate - 1e-9)} clean examples to compare with, and "
                f"{len(reference) - learned} are left of {len(reference)}; give more, or a higher rate"
            )
        self._check_memory(model, inputs, reference)
        part = reference.subset(order[:learned])
        request = Request(model, part, seed)
        with usual_mode(request.device), preserved(model), torch.no_grad():
            scorer = self.prepare(request)
            prepared = time.perf_counter()
            clean = reference.subset(order[learned:])
            null, _ = self._scored(request, scorer, clean, "calibration", progress)
            calibrated = time.perf_counter()
            scores, answers = self._scored(request, scorer, inputs, "screening", progress)
        descending = null.sort(descending=True).values
        # Those at least as high: searched from the lowest, of which the ones below are not.
        above = len(null) - torch.searchsorted(descending.flip(0), scores)
        threshold, how = self.fixed_threshold, "as published"
        if threshold is None:
            threshold = float(descending[allowed - 1])
            how = f"at most {100 * false_positive_rate:g} % of {len(null)} clean examples score higher"
        flagged = (scores > threshold).nonzero()[:, 0]
        settings = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return Screening(
            method=self.method.name,
            configuration={**settings, "seed": seed, "learned_from": learned},
            scores=scores,
            p_values=(1 + above).double() / (len(null) + 1),
            flagged=flagged[scores[flagged].argsort(descending=True, stable=True)],
            threshold=threshold,
            how=how,
            false_positive_rate=None if self.fixed_threshold is not None else false_positive_rate,
            calibrated_on=len(null),
            answers=answers,
            class_names=tuple(reference.class_names),
            ids=inputs.ids,
            seconds={
                "prepare": prepared - began,
                "calibrate": calibrated - prepared,
                "screen": time.perf_counter() - calibrated,
            },
            peak_bytes=peak_bytes(request.device),
        )

    def _scored(
        self, request: Request, scorer: Scorer, examples: Examples, stage: str, progress: Progress | None
    ) -> tuple[Tensor, Tensor]:
        """Float64[m] scores and Int64[m] answers, on the CPU."""
        scores, answers, done = [], [], 0
        for inputs, *_ in examples.in_batches(self._batch_size):
            there = placed(inputs, request.device)
            predicted = request.logits(there).argmax(1)
            scores.append(scorer(there, predicted).double().cpu())
            answers.append(predicted.cpu())
            done += len(predicted)
            if progress is not None:
                progress(stage, done, len(examples))
        return torch.cat(scores), torch.cat(answers)

    @property
    def _batch_size(self) -> int:
        own: Any = self
        return int(own.batch_size)

    def _check_memory(self, model: nn.Module, inputs: Examples, reference: Examples) -> None:
        few = reference.at(range(min(2, len(reference))))[0]
        activations = activations_of(model, few)
        parts = [few] if isinstance(few, Tensor) else list(few.values())
        one = 4 * sum(part[0].numel() for part in parts)
        longest = max(len(inputs), len(reference))

        def needed(batch: int) -> dict[str, float]:
            batch = min(batch, longest)
            kept = {"reference": one * min(self.keeps, len(reference) // 2), "inputs": 4 * one * batch}
            return {**kept, "activations": activations.reading(batch)}

        def advice(allowed: int) -> str:
            batch = min(self._batch_size, longest)
            while batch > 1:
                batch //= 2
                if sum(needed(batch).values()) <= allowed:
                    return f"batch_size={batch} would fit"
            return "no batch_size makes it fit; use a machine with more memory"

        check_memory("screen", needed(self._batch_size), advice=advice, device=device_of(model))


def _check(inputs: Examples, reference: Examples, rate: float) -> None:
    """Raise an error unless there are inputs and examples of one shape, and a rate."""
    if not len(inputs):
        raise InputError(f"{inputs.name}: there are no inputs to screen")
    if not 0 < rate < 1:
        raise InputError(f"screen: false_positive_rate must be a number in (0, 1), found {rate!r}")
    if len(reference) < 2:
        raise InputError(f"{reference.name}: {len(reference)} clean examples are too few to compare with")
    if inputs.input_shape != reference.input_shape:
        raise MismatchError(
            f"{inputs.name}: the inputs are of shape {inputs.input_shape}, those of the reference "
            f"{reference.name} of shape {reference.input_shape}; prepare both in one way"
        )
