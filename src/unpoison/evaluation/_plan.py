"""`plan`: from an experiment to its trials, and to the stages that they are made of.

A trial becomes a row: what was done, on what, and the artefacts that it is measured on. `_stage_graph` says
what a stage depends on, `_stages` what it does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, final

from unpoison._code import Source
from unpoison._seeds import derive_seed
from unpoison.errors import InputError
from unpoison.evaluation._schema import Experiment
from unpoison.evaluation._sections import (
    ANY,
    AttackChoice,
    DefenseChoice,
    DetectorChoice,
    VictimChoice,
)
from unpoison.evaluation._stage_graph import StageGraph, Values
from unpoison.evaluation._store import Stage
from unpoison.threats import Budget, find_class, read_setups


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


def plan(experiment: Experiment, *, device: str = "cpu", source: Source | None = None) -> Plan:
    """All stages and trials of an experiment. The data set is read to know its fingerprint and classes.

    Arguments:
        experiment: what to do.
        device: where the stages are to compute; results of different devices may differ in their last
            digits, and are kept apart.
        source: the source that the stages run; the installed one when None.

    Raises:
        InputError: the data cannot be read or has no test set, a class or an option of a method does not
            exist, or a set-up does not fit.
    """
    planner = _Planner(experiment, StageGraph(experiment, device, source or Source()))
    planner.trials()
    return planner.plan()


def controls(experiment: Experiment, *, device: str = "cpu") -> Plan:
    """The clean networks by which targets are chosen, and which test images they predict correctly.

    Raises:
        InputError: as `plan`.
    """
    planner = _Planner(experiment, StageGraph(experiment, device, Source()))
    planner.choosing()
    return planner.plan()


@final
@dataclass(frozen=True)
class _Scene:
    """One victim of one poison, or of none.

    Arguments:
        victim: its kind.
        number: among those of its kind and poison.
        seed: of the trial.
        poison: the input `poison`; empty where there is none.
        start: the input `start`; empty for training from scratch.
        subset: the part of a configuration that says which examples are trained on.
        words: the columns of its rows.
    """

    victim: VictimChoice
    number: int
    seed: int
    poison: Mapping[str, str]
    start: Mapping[str, str]
    subset: Values
    words: Values

    def derived(self, name: str) -> int:
        """A seed of its own; the first victim has the seed that a single one would have."""
        return derive_seed(self.seed, name, *((self.number,) if self.number else ()))


@final
class _Planner:
    """Collects the trials."""

    def __init__(self, experiment: Experiment, graph: StageGraph) -> None:
        self.experiment, self.graph = experiment, graph
        self.rows: list[str] = []
        self._check()

    def plan(self) -> Plan:
        """What has been collected."""
        experiment, stages = self.experiment, tuple(self.graph.stages.values())
        return Plan(experiment.name, experiment.to_dict(), stages, tuple(self.rows), experiment.threads)

    def _check(self) -> None:
        """Look at every method's options, class and budget before anything is done."""
        experiment, data = self.experiment, self.graph.data
        for choice in (*experiment.defenses, *experiment.detectors, *experiment.unlearners):
            choice.described()
        for attack in experiment.attacks:
            self.graph.attack(attack)
            self.graph.trigger(attack)
            for budget in _budgets(attack):
                budget.count_in(len(data.whole))
            if attack.method.surrogates and not attack.surrogate_count and experiment.pretraining is None:
                raise InputError(f"attacks: {attack.name} crafts on networks; give surrogates or pretraining")
        if experiment.targets is not None:
            for name in {name for pair in experiment.targets.pairs for name in pair} - {ANY}:
                find_class(name, data.whole.class_names, option="targets.pairs")
        data.subset(experiment.data.per_class, ())

    def choosing(self) -> None:
        """The clean networks that say which test images are predicted correctly."""
        targets, first = self.experiment.targets, self.experiment.victims[0]
        assert targets is not None
        seeds = [derive_seed(seed, "train") for seed in self.experiment.seeds]
        if targets.networks is not None:
            seeds = [derive_seed(number, "choosing targets") for number in range(targets.networks)]
        start, recipe = self.graph.pretrained(first), self.experiment.recipe(first).to_dict()
        for seed in seeds:
            clean = self.graph.trained({**self.graph.subset(()), "recipe": recipe, "seed": seed}, start)
            self.graph.measured("right_answers", {}, {"victim": clean})

    def trials(self) -> None:
        """Everything that the recipe asks for."""
        experiment, names = self.experiment, self.graph.data.whole.class_names
        if not experiment.attacks:
            words = {"attack": "none", "budget": 0.0, "source": "", "target": "", "test_indices": []}
            for seed in experiment.seeds:
                self._victims(words, {}, {}, seed)
        targets = [self._checked(one) for one in self._targets()]
        for choice in experiment.attacks:
            label = experiment.attack_label(choice)
            concealed = choice.goal_kind == "self-concealment"
            combinations = product(_budgets(choice), choice.known, targets, experiment.seeds)
            for budget, known, target, seed in combinations:
                words = {
                    "attack": f"{label}, {100 * known:g} % known" if known else label,
                    "budget": float(budget.share if budget.share is not None else budget.count or 0),
                    "source": "any other" if target["source"] is None else names[target["source"]],
                    "target": "any other" if concealed else names[target["target"]],
                    "test_indices": target["test_indices"],
                }
                subset = self.graph.subset(target["bases"])
                poison = self.graph.poison(choice, budget, self._placed(target), known, seed, subset)
                self._victims(words, {"poison": poison}, subset, seed)

    def _targets(self) -> Iterator[Values]:
        """The targets as the recipe names them."""
        targets = self.experiment.targets
        if targets is None:
            return
        if targets.correct is not None:
            raise InputError("targets.correct: the images are to be chosen by `choose_targets` first")
        for source, target in targets.pairs:
            own = None if source == ANY else source
            yield {"source": own, "target": target, "test_indices": [], "bases": []}
        for image in targets.images:
            indices = list(image.test_index)
            yield {"source": image.source, "target": image.target, "test_indices": indices, "bases": []}
        if targets.setups is not None:
            path = self.experiment.path(targets.setups)
            listed = read_setups(path)
            chosen = listed[targets.first :][: targets.count]
            if not chosen or (targets.count is not None and len(chosen) < targets.count):
                raise InputError(
                    f"{path}: has {len(listed)} set-ups; first = {targets.first} leaves {len(chosen)}"
                )
            for one in chosen:
                one.check_bases(self.graph.data.whole)
                yield {
                    "source": one.target_class,
                    "target": one.base_class,
                    "test_indices": [one.target_index],
                    "bases": list(one.base_indices),
                }

    def _checked(self, one: Values) -> Values:
        """The target with numbers for classes, checked against the test set."""
        indices, names, test = one["test_indices"], self.graph.data.whole.class_names, self.graph.test
        source = None if one["source"] is None else find_class(one["source"], names, option="targets")
        for index in indices:
            if not 0 <= index < len(test):
                raise InputError(f"targets: test image {index} is outside 0..{len(test) - 1}")
            own = int(test.labels[index])
            if source is not None and source != own:
                raise InputError(
                    f"targets: test image {index} is of class {names[own]!r}, not {names[source]!r}; is it "
                    "another test set?"
                )
            source = own
        target = find_class(one["target"], names, option="targets")
        if source == target:
            raise InputError(
                f"targets: test image {indices[0]} is of the target class {names[target]!r} itself"
            )
        return {**one, "source": source, "target": target}

    def _placed(self, target: Values) -> Values:
        """The target with its base images counted in what is trained on, at the end of which they are."""
        per_class, bases = self.experiment.data.per_class, target["bases"]
        if per_class is None or not bases:
            return target
        count = len(self.graph.data.subset(per_class, bases).training_set)
        return {**target, "bases": list(range(count - len(bases), count))}

    def _victims(self, words: Values, poison: Mapping[str, str], subset: Values, seed: int) -> None:
        """The trials of one poison, or of none."""
        for victim in self.experiment.victims:
            start = self.graph.pretrained(victim)
            for number in range(victim.count):
                own = {**words, "seed": seed, "victim": victim.name, "number": number}
                self._trials(_Scene(victim, number, seed, poison, start, subset, own))

    def _trials(self, scene: _Scene) -> None:
        """The trials of one victim: controls, defenses, detectors, and what unlearners make of it."""
        experiment, graph = self.experiment, self.graph
        recipe = experiment.recipe(scene.victim).to_dict()
        training = {**scene.subset, "recipe": recipe, "seed": scene.derived("train")}
        inputs = {**scene.poison, **scene.start}
        if graph.probed:
            training |= graph.probed
            victim = graph.trained({**training, "clean": True}, inputs)
        else:
            victim = graph.trained(training, scene.start)
        # It keeps the name of the attack whose goal it is measured on.
        self._trial(scene, {"control": "no attack"}, {"victim": victim})
        if scene.poison:
            victim = graph.trained(training, inputs)
            self._trial(scene, {"control": "no defense"}, {"victim": victim})
        for defense in experiment.defenses:
            hardened = self._defended(defense, training, inputs)
            self._trial(scene, {"defense": defense.label}, {"victim": hardened})
        for detector in experiment.detectors:
            for number in range(detector.observations):
                self._searched(scene, detector, number, victim)
        if experiment.detectors and scene.poison:
            perfect = graph.filtered("part_of_poison", {**scene.subset, "part": None}, scene.poison)
            self._healed(scene, {"detector": "perfect", "control": "perfect filter"}, victim, perfect)

    def _defended(self, defense: DefenseChoice, training: Values, inputs: Mapping[str, str]) -> str:
        if (other := self.experiment.likeness(defense)) is not None:
            inputs = {**inputs, "like": self._defended(other, training, inputs)}
        return self.graph.trained(training, inputs, defense)

    def _searched(self, scene: _Scene, detector: DetectorChoice, number: int, victim: str) -> None:
        """What a detector finds, and the filters that are compared with it."""
        graph, words = self.graph, {"detector": detector.label, "observation": number}
        pair = {**scene.poison, "victim": victim}
        findings = graph.findings(detector, number, scene.seed, scene.subset, pair)
        self._healed(scene, words, victim, findings)
        if not scene.poison and not self.experiment.unlearners:
            return  # a filter as large would show nothing
        inputs = {**scene.poison, "findings": findings}
        if detector.random_filter:
            seed = derive_seed(scene.seed, "random filter", detector.label)
            drawn = graph.filtered("random_filter", {**scene.subset, "seed": seed}, inputs)
            label = f"random, as many as {detector.label}"
            self._healed(scene, {**words, "detector": label, "control": "random filter"}, victim, drawn)
        seed = derive_seed(scene.seed, "part of poison")
        for part in detector.parts if scene.poison else ():
            chosen = {**scene.subset, "part": part, "seed": seed}
            filtered = graph.filtered("part_of_poison", chosen, inputs)
            self._healed(scene, {**words, "control": part}, victim, filtered)

    def _healed(self, scene: _Scene, words: Values, victim: str, findings: str) -> None:
        """The trials of what was flagged: judged alone, or with what every unlearner makes of it."""
        inputs = {"victim": victim, "findings": findings}
        everything = {**scene.poison, **inputs, **scene.start}
        if "calibration" in (made := self.graph.stages[findings].inputs):
            inputs["calibration"] = made["calibration"]
        if not self.experiment.unlearners:
            self._trial(scene, words, inputs)
        for unlearner in self.experiment.unlearners:
            healed = self.graph.healed(unlearner, scene.derived("heal"), scene.subset, everything)
            self._trial(scene, {**words, "unlearner": unlearner.label}, {**inputs, "healed": healed})

    def _trial(self, scene: _Scene, words: Values, inputs: Mapping[str, str]) -> None:
        """A row of the table."""
        plain = {"defense": "none", "detector": "none", "observation": 0, "unlearner": "none", "control": ""}
        configuration = {**scene.subset, "trial": {**scene.words, **plain, **words}}
        self.rows.append(self.graph.measured("measure", configuration, {**scene.poison, **inputs}))


def _budgets(choice: AttackChoice) -> Sequence[Budget]:
    return [Budget(share=share) for share in choice.budget] + [
        Budget(count=count) for count in choice.budget_count
    ]
