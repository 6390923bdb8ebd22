"""`StageGraph`: the stages of a plan, each with its configuration, its inputs and the code that it runs.

Equal stages are one, so what several trials need stands in a plan once. A stage's key is a hash of its
configuration, of its inputs and of the code that it runs: the modules that its method imports, `workflow` and
the stages themselves. After an edit of a detector its findings and what follows from them are made anew, and
nothing else is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, final

from unpoison._artefacts import digest
from unpoison._code import Source
from unpoison._seeds import derive_seed
from unpoison.errors import InputError
from unpoison.evaluation._schema import Experiment
from unpoison.evaluation._sections import (
    AttackChoice,
    DefenseChoice,
    DetectorChoice,
    InputDetectorChoice,
    MethodChoice,
    UnlearnerChoice,
    VictimChoice,
)
from unpoison.evaluation._stage_data import StageData, goal_of
from unpoison.evaluation._store import Stage
from unpoison.threats import Budget, make_trigger

_STAGES = "unpoison.evaluation._stages"
# What every stage runs, without what these modules import: that is the method's.
_ALWAYS = (_STAGES, "unpoison.evaluation._stage_data", "unpoison.workflow")
_TRAINING = ("unpoison.training:train", "unpoison.evaluation._transfer")
_PROBE = "unpoison.evaluation._probe"
_MEASURING = (
    "unpoison.evaluation._rows",
    "unpoison.evaluation._gaussian",
    "unpoison.training:predict",
    "unpoison.threats:PoisonSet",
    "unpoison.detectors:Findings",
)
# What each kind of goal is made of.
_GOALS = {
    "backdoor": ("source", "target"),
    "label-noise": ("source", "target"),
    "targeted-misclassification": ("target", "test_indices"),
    "self-concealment": ("test_indices",),
}
Values = dict[str, Any]
Given = Mapping[str, Any]
Keys = Mapping[str, str]
"""The inputs of a stage: the keys of others."""


@final
class StageGraph:
    """Collects stages. Its methods add one, unless it is there, and return its key."""

    def __init__(self, experiment: Experiment, device: str, source: Source) -> None:
        self.experiment, self.source = experiment, source
        self.surroundings: Values = {
            **dataclasses.asdict(experiment.data),
            "source": experiment.path(experiment.data.source),
            "test": experiment.data.test and experiment.path(experiment.data.test),
            "device": device,
            "threads": experiment.threads,
        }
        self.data = StageData.read(self.surroundings)
        self.test = self.data.test
        self.stages: dict[str, Stage] = {}
        self._codes: dict[tuple[str, ...], str] = {}

    def add(
        self,
        kind: str,
        function: str,
        configuration: Given,
        inputs: Keys,
        *modules: str,
        around: Given | None = None,
    ) -> str:
        """A stage that runs a function of `_stages` and these modules."""
        if modules not in self._codes:
            self._codes[modules] = self.source.digest({*self.source.closure(*modules), *_ALWAYS})
        common = {
            "data": self.data.whole.fingerprint,
            "device": self.surroundings["device"].partition(":")[0],
            "threads": self.experiment.threads,
        }
        made = Stage(
            kind,
            f"{_STAGES}:{function}",
            {**common, **configuration},
            inputs,
            {**self.surroundings, **(around or {})},
            self._codes[modules],
        )
        return self.stages.setdefault(made.key, made).key

    @cached_property
    def tested(self) -> Values:
        """The part of a configuration in which stages that look at the test set differ."""
        return {"test": self.test.fingerprint}

    @cached_property
    def probed(self) -> Values:
        """The part of a configuration in which trainings with a probe differ."""
        probe = self.experiment.probe
        return {**self.tested, "probe": list(probe)} if probe else {}

    def subset(self, bases: Sequence[int]) -> Values:
        """The part of a configuration that says which examples are trained on."""
        per_class = self.experiment.data.per_class
        return {} if per_class is None else {"per_class": per_class, "bases": list(bases)}

    def pretrained(self, victim: VictimChoice) -> dict[str, str]:
        """The input `start` of what is fine-tuned; none from scratch."""
        pretraining = self.experiment.pretraining
        if pretraining is None:
            return {}
        absent = ("test", "test_rows", "reference_rows", "groups")
        around: Values = {"rows": pretraining.rows, **dict.fromkeys(absent)}
        if pretraining.source is not None:
            around["source"] = self.experiment.path(pretraining.source)
        before = StageData.read({**self.surroundings, **around}).whole
        if before.image_shape != self.data.whole.image_shape:
            raise InputError(
                f"pretraining: {before.name} has images of shape {before.image_shape}, "
                f"{self.data.whole.name} of shape {self.data.whole.image_shape}"
            )
        configuration = {
            "data": before.fingerprint,
            "recipe": self.experiment.pretraining_recipe(victim).to_dict(),
            "seed": pretraining.seed,
        }
        return {"start": self.add("train", "victim", configuration, {}, *_TRAINING, around=around)}

    @cached_property
    def _freeze(self) -> Values:
        pretraining = self.experiment.pretraining
        return {"freeze": True} if pretraining is not None and pretraining.freeze else {}

    def trained(self, training: Given, inputs: Keys, defense: DefenseChoice | None = None) -> str:
        """A victim or a surrogate; with a defense, in which case `inputs` may name one to copy."""
        modules = [_PROBE] if "probe" in training else []
        configuration = {**training, **self._freeze}
        if defense is not None:
            modules.append(_module(defense))
            configuration["defense"] = defense.described()
        return self.add("train", "victim", configuration, inputs, *_TRAINING, *modules)

    def poison(
        self, choice: AttackChoice, budget: Budget, target: Given, known: float, seed: int, subset: Given
    ) -> str:
        """The poison of one attack on one target, without the share of it that is known."""
        experiment = self.experiment
        trigger, around = self.trigger(choice)
        start = self.pretrained(experiment.victims[0]) if choice.method.accepts_surrogates else {}
        recipe = experiment.surrogate_recipe(choice).to_dict()
        attack = self.attack(choice, target["places"])
        surrogates = {
            f"surrogate {number}": self.trained(
                {**subset, "recipe": recipe, "seed": derive_seed(seed, "surrogate", number)}, start
            )
            for number in range(choice.surrogate_count)
        }
        parts = {key: target[key] for key in _GOALS.get(choice.goal_kind, ())}
        if "bases" in attack["options"]:  # some published set-ups name a base image twice
            bases = len(attack["options"]["bases"])
            budget = Budget(count=min(budget.count_in(len(self.data.whole)), bases))
        configuration: Values = {
            **self.tested,
            **subset,
            "attack": attack,
            "goal": {"kind": choice.goal_kind, **parts, **trigger},
            "budget": budget.to_json(),
            "seed": derive_seed(seed, "craft"),
        }
        goal_of(configuration["goal"], self.test, around.get("trigger"))
        inputs = {**surrogates, **start}
        poison = self.add("craft", "craft", configuration, inputs, _module(choice), around=around)
        if not known:
            return poison
        share = {"known": known, "seed": derive_seed(seed, "known")}
        return self.add("craft", "corrected", share, {"poison": poison}, "unpoison.threats:PoisonSet")

    def attack(self, choice: AttackChoice, bases: Sequence[int] = ()) -> Values:
        """The attack with its options, the base images of the set-up and how it trains surrogates itself."""
        kind: Any = choice.METHODS.implementation(choice.name)
        fields = {one.name for one in dataclasses.fields(kind)}
        preset = getattr(kind, "PRESETS", {}).get(choice.preset or choice.method.presets[0], {})
        options: Values = {}
        if bases and "bases" in fields:
            options["bases"] = list(bases)
        if "recipe" in fields and "recipe" not in preset:
            options["recipe"] = self.experiment.surrogate_recipe(choice).to_dict()
        return choice.described(**options)

    def trigger(self, choice: AttackChoice) -> tuple[Values, Values]:
        """The trigger of a goal, and where its picture lies; hashed is what the picture shows."""
        if choice.goal_kind not in ("backdoor", "all-to-all"):
            return {}, {}
        path = Path(self.experiment.path(choice.trigger))
        if not path.is_file():
            make_trigger(choice.trigger, option="attacks.trigger")
            return {"trigger": choice.trigger}, {}
        return {"trigger": f"picture {digest(path.read_bytes())}"}, {"trigger": str(path)}

    def findings(self, detector: DetectorChoice, number: int, seed: int, subset: Given, pair: Keys) -> str:
        """What a detector finds in a victim from the observation of that number."""
        finding: Values = {
            **self.tested,
            **subset,
            "detector": detector.described(),
            "seed": derive_seed(seed, "find", detector.label),
        }
        if detector.method.needs_observation:
            asked = {"answers": detector.answers, "inputs": detector.inputs, "number": number}
            finding["observation"] = asked
        code, labelled = _module(detector), self._labelled(detector)
        if detector.method.calibrates:
            calibrating = {
                **subset,
                **labelled,
                "detector": finding["detector"],
                "seed": derive_seed(seed, "calibrate", detector.name),
            }
            pair = {**pair, "calibration": self.add("calibrate", "calibrate", calibrating, pair, code)}
        else:
            finding |= labelled
        return self.add("find", "find", finding, pair, code, *_MEASURING)

    def _labelled(self, detector: DetectorChoice) -> Values:
        """The part of a configuration that says what a detector is given beside the training set."""
        declared, reference, given = detector.method, self.data.reference, dict[str, Any]()
        if declared.uses_reference and reference is not None:
            given["reference"] = reference.fingerprint
        if declared.calibrates and self.experiment.data.groups is not None:
            given["groups"] = self.experiment.data.groups
        return given

    def screened(self, detector: InputDetectorChoice, seed: int, subset: Given, pair: Keys) -> str:
        """What a test-time detector says of test images with and without the trigger."""
        reference = self.data.reference
        assert reference is not None
        screening = {
            **self.tested,
            **subset,
            "reference": reference.fingerprint,
            "input_detector": detector.described(),
            "clean": detector.clean,
            "triggered": detector.triggered,
            "seed": derive_seed(seed, "screen", detector.label),
        }
        return self.add("screen", "screen", screening, pair, _module(detector), *_MEASURING)

    def filtered(self, function: str, configuration: Given, inputs: Keys) -> str:
        """What a filter takes out that detectors are compared with."""
        return self.add("find", function, configuration, inputs, *_MEASURING)

    def healed(
        self,
        unlearner: UnlearnerChoice,
        seed: int,
        subset: Given,
        inputs: Keys,
        detector: DetectorChoice | None,
    ) -> str:
        """What an unlearner makes of a victim; with a detector in the rounds that the recipe allows it."""
        healing: Values = {**subset, **self._freeze, "unlearner": unlearner.described(), "seed": seed}
        if unlearner.method.uses_reference and self.data.reference is not None:
            healing["reference"] = self.data.reference.fingerprint
        if detector is None or not unlearner.rounds:
            return self.add("heal", "heal", healing, inputs, _module(unlearner), *_TRAINING)
        healing |= {**self._labelled(detector), "detector": detector.described(), "rounds": unlearner.rounds}
        methods = (_module(detector), _module(unlearner))
        return self.add("heal", "repaired", healing, inputs, *methods, "unpoison._repair", *_TRAINING)

    def measured(self, function: str, configuration: Given, inputs: Keys) -> str:
        """A row, or another measurement."""
        return self.add("measure", function, {**self.tested, **configuration}, inputs, *_MEASURING)


def _module(choice: MethodChoice) -> str:
    return choice.METHODS.module(choice.name)
