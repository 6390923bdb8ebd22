"""`plan`: from an experiment to its stages and trials.

Stages that several trials need stand in the plan once: a poison is crafted once for all detectors, a victim
trained once for all of them, the clean model once for all attacks with the same seed, and so are the
surrogates that attacks are crafted on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any, final

from unpoison import data
from unpoison._artefacts import digest
from unpoison._seeds import derive_seed
from unpoison.data import TrainingSet
from unpoison.errors import InputError, nearest
from unpoison.evaluation._experiment import (
    TRIGGERS,
    AttackChoice,
    DefenseChoice,
    Experiment,
    Target,
)
from unpoison.evaluation._stages import (
    attack_of,
    defense_of,
    detector_of,
    goal_of,
    loaded,
    unlearner_of,
)
from unpoison.evaluation._store import Stage
from unpoison.threats import Budget

_STAGES = "unpoison.evaluation._stages"
Values = dict[str, Any]


@final
@dataclass(frozen=True)
class Plan:
    """What a sweep has to do.

    Arguments:
        name: of the recipe.
        experiment: the recipe, as JSON values.
        stages: every stage once, each after those it depends on.
        rows: the key of the stage that gives a trial's row, in the order of the table.
        threads: processor threads of a stage.
    """

    name: str
    experiment: Mapping[str, Any]
    stages: tuple[Stage, ...]
    rows: tuple[str, ...]
    threads: int = 1


def plan(experiment: Experiment, *, device: str = "cpu") -> Plan:
    """All stages and trials of an experiment. The data set is read to know its fingerprint and classes.

    Arguments:
        experiment: what to do.
        device: where the stages are to compute; results of different devices may differ in their last
            digits, and are kept apart.

    Raises:
        InputError: the data cannot be read or has no test set, a class or an option of a method does not
        exist, or
            a set-up does not fit.
    """
    return _planned(experiment, device, controls_alone=False)


def controls(experiment: Experiment, *, device: str = "cpu") -> Plan:
    """The clean network of every seed, and which test images it answers rightly; without trials.

    Raises:
        InputError: as `plan`.
    """
    return _planned(experiment, device, controls_alone=True)


def _planned(experiment: Experiment, device: str, *, controls_alone: bool) -> Plan:
    source = experiment.path(experiment.data.source)
    test = None if experiment.data.test is None else experiment.path(experiment.data.test)
    splits = loaded(source, test, experiment.data.rows, experiment.data.test_rows)
    if splits.test is None:
        raise InputError(f"{source}: has no test set to measure on; give data.test")
    targets: list[Values] = []
    if not controls_alone:
        targets = [_target(one, splits) for one in experiment.targets.each(Path(experiment.folder))]
    for defense in experiment.defenses:
        defense_of(defense, 0)
    for detector in experiment.detectors:
        detector_of(detector, 0)
    for unlearner in experiment.unlearners:
        unlearner_of(unlearner)

    surroundings: Values = {"data": source, "test": test, "device": device, "threads": experiment.threads}
    surroundings |= {"rows": experiment.data.rows, "test_rows": experiment.data.test_rows}
    common = {
        "data": splits.train.fingerprint,
        "test": splits.test.fingerprint,
        "device": device.partition(":")[0],
        "threads": experiment.threads,
    }
    names = splits.train.class_names
    stages: dict[str, Stage] = {}
    rows: list[str] = []

    def stage(
        kind: str, function: str, configuration: Values, inputs: Values, around: Values | None = None
    ) -> str:
        made = Stage(
            kind,
            f"{_STAGES}:{function}",
            {**common, **configuration},
            inputs,
            surroundings if around is None else around,
        )
        return stages.setdefault(made.key, made).key

    start: Values = {}
    if (pretraining := experiment.pretraining) is not None:
        place = source if pretraining.source is None else experiment.path(pretraining.source)
        before = loaded(place, None, pretraining.rows, None).train
        if before.class_names != splits.train.class_names or before.image_shape != splits.train.image_shape:
            raise InputError(f"pretraining: {place} has other classes or image sizes than {source}")
        start["start"] = stage(
            "train",
            "pretrained",
            {
                "pretraining": before.fingerprint,
                "recipe": experiment.pretraining_recipe(pretraining).to_dict(),
                "seed": pretraining.seed,
            },
            {},
            {**surroundings, "data": place, "test": None, "rows": pretraining.rows},
        )

    for choice in experiment.attacks:
        attack_of(choice)
        _attack(choice, experiment, surroundings)
        for budget in _budgets(choice):
            budget.count_in(len(splits.train))

    if controls_alone:
        for name in chain.from_iterable(experiment.targets.pairs):
            _class(name, splits.train)
        for seed in experiment.seeds:
            training = {"recipe": experiment.recipe.to_dict(), "seed": derive_seed(seed, "train")}
            clean = stage("train", "victim", training, start)
            stage("measure", "right_answers", {}, {"victim": clean})
        return Plan(experiment.name, experiment.to_dict(), tuple(stages.values()), (), experiment.threads)

    def trial(words: Values, inputs: Values) -> None:
        rows.append(stage("measure", "measure", {"trial": words}, inputs))

    def defended(defense: DefenseChoice, training: Values, poison: str, seed: int) -> str:
        inputs = {"poison": poison, **start}
        if (other := experiment.likeness(defense)) is not None:
            inputs["like"] = defended(other, training, poison, seed)
        described = {**asdict(defense), "seed": derive_seed(seed, "defense", defense.label)}
        return stage("train", "victim", {**training, "defense": described}, inputs)

    for choice in experiment.attacks:
        configuration, around = _attack(choice, experiment, surroundings)
        for target in targets:
            goal_of(choice, target, splits, around.get("trigger", choice.trigger))
        needed = choice.surrogate_count
        if needed:
            configuration["surrogates"] = needed
        for budget, target, seed in product(_budgets(choice), targets, experiment.seeds):
            words = {
                "attack": experiment.attack_label(choice),
                "budget": float(budget.share if budget.share is not None else budget.count or 0),
                "source": names[target["source"]],
                "target": names[target["target"]],
                "test_index": target["test_index"],
                "seed": seed,
                "defense": "none",
                "detector": "none",
                "unlearner": "none",
                "control": "",
            }
            poison = stage(
                "craft",
                "craft",
                {
                    **configuration,
                    "budget": budget.to_json(),
                    "target": target,
                    "seed": derive_seed(seed, "craft"),
                },
                {
                    f"surrogate {number}": stage(
                        "train",
                        "victim",
                        {
                            "recipe": experiment.surrogate_recipe(choice).to_dict(),
                            "seed": derive_seed(seed, "surrogate", number),
                        },
                        start,
                    )
                    for number in range(needed)
                }
                | (start if needed else {}),
                around,
            )
            training = {"recipe": experiment.recipe.to_dict(), "seed": derive_seed(seed, "train")}
            clean = stage("train", "victim", training, start)
            victim = stage("train", "victim", training, {"poison": poison, **start})
            # It keeps the name of the attack whose goal it is measured on.
            trial({**words, "control": "no attack"}, {"poison": poison, "victim": clean})
            trial({**words, "control": "no defense"}, {"poison": poison, "victim": victim})
            pair = {"poison": poison, "victim": victim}
            for defense in experiment.defenses:
                hardened = defended(defense, training, poison, seed)
                trial({**words, "defense": defense.label}, {"poison": poison, "victim": hardened})

            filters: list[tuple[str, str, str]] = []
            for detector in experiment.detectors:
                finding = {"detector": asdict(detector), "seed": derive_seed(seed, "find", detector.label)}
                findings = stage("find", "find", finding, pair)
                lottery = {"seed": derive_seed(seed, "random filter", detector.label)}
                at_random = stage("find", "random_filter", lottery, {"poison": poison, "findings": findings})
                filters.append((detector.label, "", findings))
                filters.append((f"random, as many as {detector.label}", "random filter", at_random))
            if experiment.detectors:
                perfect = stage("find", "perfect_filter", {}, {"poison": poison})
                filters.append(("perfect", "perfect filter", perfect))
            for label, control, findings in filters:
                judged = {**words, "detector": label, "control": control}
                if not experiment.unlearners:
                    trial(judged, {**pair, "findings": findings})
                for unlearner in experiment.unlearners:
                    healing = {"unlearner": asdict(unlearner), "seed": derive_seed(seed, "heal")}
                    healed = stage("heal", "heal", healing, {**pair, "findings": findings, **start})
                    trial(
                        {**judged, "unlearner": unlearner.label},
                        {**pair, "findings": findings, "healed": healed},
                    )
    return Plan(
        experiment.name, experiment.to_dict(), tuple(stages.values()), tuple(rows), experiment.threads
    )


def _target(one: Target, splits: data.Splits) -> Values:
    """The set-up with numbers for classes, as JSON values."""
    test, index = splits.test, one.test_index
    assert test is not None
    source = None if one.source is None else _class(one.source, splits.train)
    if index is not None:
        if not 0 <= index < len(test):
            raise InputError(f"targets: test image {index} is outside 0..{len(test) - 1}")
        own = int(test.labels[index])
        if source is not None and source != own:
            names = splits.train.class_names
            raise InputError(
                f"targets: test image {index} is of class {names[own]!r}, not {names[source]!r}; is it "
                "another test set?"
            )
        source = own
    target = _class(one.target, splits.train)
    if source == target:
        raise InputError(
            f"targets: test image {index} is of the target class {splits.train.class_names[target]!r} itself"
        )
    return {**asdict(one), "source": source, "target": target}


def _class(name: str | int, training_set: TrainingSet) -> int:
    names = training_set.class_names
    if isinstance(name, int):
        if not 0 <= name < len(names):
            raise InputError(f"targets: class {name} is outside 0..{len(names) - 1}")
        return name
    if name not in names:
        raise InputError(f"targets: {training_set.name} has no class {name!r}; {nearest(name, names)}")
    return names.index(name)


def _budgets(choice: AttackChoice) -> list[Budget]:
    return [Budget(share=share) for share in choice.budget] + [
        Budget(count=count) for count in choice.budget_count
    ]


def _attack(choice: AttackChoice, experiment: Experiment, surroundings: Values) -> tuple[Values, Values]:
    """The attack without its budgets, and where its trigger's picture lies; hashed is what the picture
    shows."""
    described: Values = {"name": choice.name, "budget": (1.0,), "options": dict(choice.options)}
    if choice.trigger in TRIGGERS:
        return {"attack": {**described, "trigger": choice.trigger}}, surroundings
    path = Path(experiment.path(choice.trigger))
    if not path.is_file():
        raise InputError(
            f"attacks: trigger {choice.trigger!r} is no image file; {nearest(choice.trigger, TRIGGERS)}"
        )
    picture = f"picture {digest(path.read_bytes())}"
    return {"attack": {**described, "trigger": picture}}, {**surroundings, "trigger": str(path)}
