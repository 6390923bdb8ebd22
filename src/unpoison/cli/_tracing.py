"""What `trace` and `repair` share: the input that was answered wrongly, the detector and its calibration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from unpoison import detectors, workflow
from unpoison._inputs import Inputs, joined
from unpoison._progress import Progress
from unpoison.cli._inputs import (
    Subject,
    groups_of,
    load_model,
    load_set,
    options_of,
    reference_of,
    told_of,
    transform_of,
)
from unpoison.cli._options import Repair, Trace
from unpoison.cli._session import Session
from unpoison.cli._suspects import suspect_of
from unpoison.data import Examples, Splits
from unpoison.detectors import Calibrated, Calibration, Observation
from unpoison.errors import InputError
from unpoison.influence import InfluenceIndex
from unpoison.threats import PoisonSet, find_class

KEPT = "calibration"


@final
@dataclass(frozen=True)
class Tracing:
    """What is traced, and how.

    Arguments:
        splits: the data without poison.
        training_set: with it.
        poison: where it is known.
        subject: the model.
        observation: checked.
        words: what the observed images are.
        given: the arguments of `workflow.trace` beside these.
        place: where the calibration is kept; None where the detector makes none, or there is no place.
    """

    splits: Splits[Examples]
    training_set: Examples
    poison: PoisonSet | None
    subject: Subject
    observation: Observation
    words: str
    given: dict[str, Any]
    place: Path | None

    @classmethod
    def of(cls, options: Trace | Repair, run: Session) -> Tracing:
        """Read what the options name.

        Raises:
            InputError: something is not there, or does not fit.
        """
        asked = options.tracing
        changes = options_of(asked.option)
        if asked.modules:
            changes["modules"] = list(asked.modules)
        detector = detectors.get(asked.method, preset=asked.preset, **changes)
        calibrates = detectors.describe(asked.method).calibrates
        for name in ("groups", "calibration"):
            if getattr(asked, name) is not None and not calibrates:
                raise InputError(
                    f"--{name}: is for detectors that calibrate, which {asked.method} does not; leave it out"
                )
        with run.reading() as progress:
            splits, training_set, poison = load_set(options, run.device, progress=progress)
        run.note(splits)
        reference = splits.test if calibrates else None
        if asked.reference is not None:
            reference = reference_of(asked.reference, options, run.device)
        subject = load_model(options.model, options.architecture, training_set, run.device)
        transform = transform_of(options)
        suspects = [suspect_of(text, splits, poison, options.images, transform) for text in asked.suspect]
        if not suspects:
            raise InputError("--suspect: name at least one input, an image file or test:INDEX")
        shapes = {_shape(one.inputs) for one in suspects}
        if len(shapes) != 1:
            raise InputError("--suspect: the inputs are of different sizes")
        images = isinstance(suspects[0].inputs, torch.Tensor) and suspects[0].inputs.ndim == 4
        truths = {one.true_label for one in suspects}
        names = training_set.class_names
        true_label = truths.pop() if len(truths) == 1 else None
        if asked.true is not None:
            true_label = find_class(asked.true, names, option="--true")
        predicted = None
        if asked.predicted is not None:
            predicted = find_class(asked.predicted, names, option="--predicted")
        try:
            observation = detectors.check_observation(
                subject.network,
                training_set,
                Observation(
                    joined([one.inputs for one in suspects]),
                    predicted,
                    true_label,
                    count=None if images else len(suspects),
                ),
            )
        except InputError as error:
            raise InputError(f"--suspect {' '.join(asked.suspect)}: {error}") from None
        given: dict[str, Any] = {
            "method": detector,
            "reference": reference,
            "seed": options.run.seed,
            "task": subject.task,
        }
        index = None
        if isinstance(options, Trace):
            if options.index is not None:
                index = given["index"] = InfluenceIndex.open(options.index)
            if options.refine is not None:
                given["refine"] = options.refine
        if asked.groups is not None:
            given["groups"] = groups_of(asked.groups, len(training_set))
        place = asked.calibration
        if place is None and index is not None:
            place = index.calibration
        if place is None and calibrates and Path(options.model).is_dir():
            place = Path(options.model) / KEPT
        if place is not None and place.exists() and not (place / f"{KEPT}.json").is_file():
            raise InputError(
                f"--calibration {place}: exists and holds no calibration; name another directory"
            )
        words = ", ".join(one.words for one in suspects)
        return cls(splits, training_set, poison, subject, observation, words, given, place)

    def calibrate(self, run: Session, progress: Progress) -> None:
        """Take the calibration that is kept, or make one and keep it, where the detector has one."""
        detector = self.given["method"]
        if not isinstance(detector, Calibrated):
            return
        options = {key: value for key, value in self.given.items() if key in ("groups", "seed", "index")}
        reference = self.given["reference"]
        calibration: Calibration | None = None
        if self.place is not None:
            calibration = detector.kept(
                self.place, self.subject.network, self.training_set, reference, **options
            )
        if calibration is not None:
            run.console.say(f"the calibration in {self.place} is of this model and is used again")
        else:
            calibration = workflow.calibrate(
                self.subject.model,
                self.training_set,
                reference,
                method=detector,
                task=self.subject.task,
                progress=progress,
                **options,
            )
            self._keep(calibration, run)
        self.given["calibration"] = calibration
        run.results["calibration"] = calibration.source

    def _keep(self, calibration: Calibration, run: Session) -> None:
        if self.place is None:
            return
        try:
            calibration.save(self.place)
        except OSError as error:
            run.console.say(f"the calibration is not kept: {self.place}: {error.strerror}")
        else:
            run.console.say(f"the calibration is kept in {self.place}, for further traces of this model")

    def told(self) -> list[str]:
        """What the false-alarm level is worth, in lines."""
        calibration = self.given.get("calibration")
        if calibration is None or calibration.held_out:
            return []
        return [
            "without labelled held-out data the level hardly holds, as the model has learned the examples "
            "that it is calibrated on; name some with --reference or --test-data"
        ]

    def asked(self) -> dict[str, Any]:
        """What was traced, for run.json."""
        names, observation = self.training_set.class_names, self.observation
        truth = observation.true_label
        return {
            "suspect": self.words,
            "predicted": names[observation.answer],
            "true": None if truth is None else names[truth],
            **told_of(self.training_set),
        }


def _shape(inputs: Inputs) -> tuple[Any, ...]:
    """The shape of a tensor, or the names and shapes of those of a mapping."""
    if isinstance(inputs, torch.Tensor):
        return tuple(inputs.shape)
    return tuple(sorted((name, *part.shape) for name, part in inputs.items()))
