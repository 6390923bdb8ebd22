"""`plan`: from an experiment to its trials, and to the stages that they are made of.

A trial becomes a row: what was done, on what, and the artefacts that it is measured on. `_stage_graph` says
what a stage depends on, `_stages` what it does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product
from typing import Any, final

from unpoison._code import Source
from unpoison._seeds import derive_seed
from unpoison.errors import InputError
from unpoison.evaluation._schema import Experiment
from unpoison.evaluation._sections import (
    ANY,
    FOR_ALL,
    AttackChoice,
    DefenseChoice,
    DetectorChoice,
    UnlearnerChoice,
    VictimChoice,
)
from unpoison.evaluation._stage_graph import Keys, StageGraph, Values
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
    graph = StageGraph(experiment, device, source or Source())
    _check(graph)
    return _planned(graph, _trials(graph))


def controls(experiment: Experiment, *, device: str = "cpu") -> Plan:
    """The clean networks by which targets are chosen, and which test images they predict correctly."""
    graph = StageGraph(experiment, device, Source())
    _check(graph)
    targets, first = experiment.targets, experiment.victims[0]
    assert targets is not None
    seeds = [derive_seed(seed, "train") for seed in experiment.seeds]
    if targets.networks is not None:
        seeds = [derive_seed(number, "choosing targets") for number in range(targets.networks)]
    start, recipe = graph.pretrained(first), experiment.recipe(first).to_dict()
    for seed in seeds:
        clean = graph.trained({**graph.subset(()), "recipe": recipe, "seed": seed}, start)
        graph.measured("right_answers", {}, {"victim": clean})
    return _planned(graph, ())


def _planned(graph: StageGraph, trials: Iterable[str]) -> Plan:
    rows = tuple(trials)  # which adds the stages to the graph
    experiment, stages = graph.experiment, tuple(graph.stages.values())
    return Plan(experiment.name, experiment.to_dict(), stages, rows, experiment.threads)


def _check(graph: StageGraph) -> None:
    """Look at every method's options, class and budget before anything is done."""
    experiment, data = graph.experiment, graph.data
    for choice in (
        *experiment.defenses,
        *experiment.detectors,
        *experiment.input_detectors,
        *experiment.unlearners,
    ):
        choice.described()
    for attack in experiment.attacks:
        graph.attack(attack)
        graph.trigger(attack)
        for budget in _budgets(attack):
            budget.count_in(len(data.whole))
        if attack.method.surrogates and not attack.surrogate_count and experiment.pretraining is None:
            raise InputError(f"attacks: {attack.name} crafts on networks; give surrogates or pretraining")
    if experiment.targets is not None:
        for name in {*chain.from_iterable(experiment.targets.pairs)} - {ANY}:
            find_class(name, data.whole.class_names, option="targets.pairs")
    data.subset(experiment.data.per_class, ())


def _trials(graph: StageGraph) -> Iterator[str]:
    """The rows of everything that the recipe asks for."""
    experiment, names = graph.experiment, graph.data.whole.class_names
    if not experiment.attacks:
        words = {"attack": "none", "budget": 0.0, "source": "", "target": "", "test_indices": []}
        for seed in experiment.seeds:
            yield from _victims(graph, words, {}, {}, seed)
    targets = [_checked(graph, *one) for one in _targets(graph)]
    for choice in experiment.attacks:
        label = experiment.attack_label(choice)
        fitting = _fitting(choice, targets)
        combinations = product(_budgets(choice), choice.known, fitting, experiment.seeds)
        for budget, known, target, seed in combinations:
            words = {
                "attack": f"{label}, {100 * known:g} % known" if known else label,
                "budget": float(budget.share if budget.share is not None else budget.count or 0),
                "source": "any other" if target["source"] is None else names[target["source"]],
                "target": _target_in_words(choice, target, names),
                "test_indices": target["test_indices"],
            }
            subset = graph.subset(target["bases"])
            poison = graph.poison(choice, budget, target, known, seed, subset)
            yield from _victims(graph, words, {"poison": poison}, subset, seed)


def _fitting(choice: AttackChoice, targets: Sequence[Values]) -> list[Values]:
    """The targets that the goal of an attack can have: one for all classes, or one that names a class."""
    for_all = choice.goal_kind in FOR_ALL
    found = [one for one in targets if (one["target"] is None) == for_all]
    if not found:
        pair = f'["{ANY}", "{ANY}"]' if for_all else "a target class"
        raise InputError(
            f"targets: the goal {choice.goal_kind!r} of {choice.name} needs {pair} among the pairs"
        )
    return found


def _target_in_words(choice: AttackChoice, target: Values, names: Sequence[str]) -> str:
    if choice.goal_kind == "all-to-all":
        return "the next"
    if target["target"] is None or choice.goal_kind == "self-concealment":
        return "any other"
    return names[target["target"]]


def _budgets(choice: AttackChoice) -> list[Budget]:
    counts = [Budget(count=count) for count in choice.budget_count]
    return [Budget(share=share) for share in choice.budget] + counts


def _targets(graph: StageGraph) -> list[tuple[Any, Any, Sequence[int], Sequence[int]]]:
    """Source, target, test indices and base images of every target, as the recipe names them."""
    targets = graph.experiment.targets
    if targets is None:
        return []
    if targets.correct is not None:
        raise InputError("targets.correct: the images are to be chosen by `choose_targets` first")
    if targets.setups is None:
        named = [[None if name == ANY else name for name in pair] for pair in targets.pairs]
        return [
            *((source, target, (), ()) for source, target in named),
            *((one.source, one.target, one.test_index, ()) for one in targets.images),
        ]
    path = graph.experiment.path(targets.setups)
    listed = read_setups(path)
    chosen = listed[targets.first :][: targets.count]
    if not chosen or (targets.count is not None and len(chosen) < targets.count):
        raise InputError(f"{path}: has {len(listed)} set-ups; first = {targets.first} leaves {len(chosen)}")
    for one in chosen:
        one.check_bases(graph.data.whole)
    return [(one.target_class, one.base_class, (one.target_index,), one.base_indices) for one in chosen]


def _checked(
    graph: StageGraph, source: Any, target: Any, indices: Sequence[int], bases: Sequence[int]
) -> Values:
    """A target with numbers for classes, checked against the test set.

    `places` are those of the base images in what is trained on, at the end of which they are put.
    """
    names, test, per_class = graph.data.whole.class_names, graph.test, graph.experiment.data.per_class
    source = None if source is None else find_class(source, names, option="targets")
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
    target = None if target is None else find_class(target, names, option="targets")
    if source == target is not None:
        what = f"test image {indices[0]} is of" if indices else "the source is"
        raise InputError(f"targets: {what} the target class {names[target]!r} itself")
    places = list(bases)
    if per_class is not None and bases:
        count = len(graph.data.subset(per_class, bases).training_set)
        places = list(range(count - len(bases), count))
    classes = {"source": source, "target": target}
    return {**classes, "test_indices": list(indices), "bases": list(bases), "places": places}


def _victims(graph: StageGraph, words: Values, poison: Keys, subset: Values, seed: int) -> Iterator[str]:
    """The rows of one poison, or of none."""
    for victim in graph.experiment.victims:
        start = graph.pretrained(victim)
        for number in range(victim.count):
            own = {**words, "seed": seed, "victim": victim.name, "number": number}
            yield from _Scene(graph, victim, number, seed, poison, start, subset, own).rows()


@final
@dataclass(frozen=True)
class _Scene:
    """One victim of one poison, or of none; its methods give the keys of rows.

    Arguments:
        victim: its kind.
        number: among those of its kind and poison.
        seed: of the trial.
        poison: the input `poison`; empty where there is none.
        start: the input `start`; empty for training from scratch.
        subset: the part of a configuration that says which examples are trained on.
        words: the columns of its rows.
    """

    graph: StageGraph
    victim: VictimChoice
    number: int
    seed: int
    poison: Keys
    start: Keys
    subset: Values
    words: Values

    def rows(self) -> Iterator[str]:
        """Controls, defenses, detectors, and what unlearners make of the victim."""
        experiment, graph = self.graph.experiment, self.graph
        recipe = experiment.recipe(self.victim).to_dict()
        training = {**self.subset, "recipe": recipe, "seed": self._derived("train")}
        inputs = {**self.poison, **self.start}
        if graph.probed:
            training |= graph.probed
            victim = graph.trained({**training, "clean": True}, inputs)
        else:
            victim = graph.trained(training, self.start)
        # It keeps the name of the attack whose goal it is measured on.
        yield self._row({"control": "no attack"}, {"victim": victim})
        if self.poison:
            victim = graph.trained(training, inputs)
            yield self._row({"control": "no defense"}, {"victim": victim})
        for defense in experiment.defenses:
            hardened = self._defended(defense, training, inputs)
            yield self._row({"defense": defense.label}, {"victim": hardened})
        for detector in experiment.detectors:
            for number in range(detector.observations):
                yield from self._searched(detector, number, victim)
        for screener in experiment.input_detectors:
            pair = {**self.poison, "victim": victim}
            screening = graph.screened(screener, self.seed, self.subset, pair)
            yield self._row({"detector": screener.label}, {"victim": victim, "screening": screening})
        if experiment.detectors and self.poison:
            perfect = graph.filtered("part_of_poison", {**self.subset, "part": None}, self.poison)
            yield from self._healed({"detector": "perfect", "control": "perfect filter"}, victim, perfect)
        for share in experiment.discovered if self.poison else ():
            drawn = {
                **self.subset,
                "part": None,
                "share": share,
                "seed": derive_seed(self.seed, "discovered"),
            }
            found = graph.filtered("part_of_poison", drawn, self.poison)
            words = {"detector": "perfect", "control": f"{100 * share:g} % found"}
            yield from self._healed(words, victim, found)
        for unlearner in self._told(False):
            given = {**self.poison, "victim": victim, **self.start}
            healed = graph.healed(unlearner, self._derived("heal"), self.subset, given, None)
            yield self._row({"unlearner": unlearner.label}, {"victim": victim, "healed": healed})

    def _told(self, findings: bool) -> list[UnlearnerChoice]:
        """The unlearners that need findings, or those that need none."""
        chosen = self.graph.experiment.unlearners
        return [one for one in chosen if one.method.needs_findings == findings]

    def _derived(self, name: str) -> int:
        """A seed of its own; the first victim has the seed that a single one would have."""
        return derive_seed(self.seed, name, *((self.number,) if self.number else ()))

    def _defended(self, defense: DefenseChoice, training: Values, inputs: Keys) -> str:
        if (other := self.graph.experiment.likeness(defense)) is not None:
            inputs = {**inputs, "like": self._defended(other, training, inputs)}
        return self.graph.trained(training, inputs, defense)

    def _searched(self, detector: DetectorChoice, number: int, victim: str) -> Iterator[str]:
        """What a detector finds, and the filters that are compared with it."""
        graph, words = self.graph, {"detector": detector.label, "observation": number}
        pair = {**self.poison, "victim": victim}
        findings = graph.findings(detector, number, self.seed, self.subset, pair)
        yield from self._healed(words, victim, findings, detector)
        if not self.poison and not self._told(True):
            return  # a filter as large would show nothing
        inputs = {**self.poison, "findings": findings}
        if detector.random_filter:
            seed = derive_seed(self.seed, "random filter", detector.label)
            drawn = graph.filtered("random_filter", {**self.subset, "seed": seed}, inputs)
            label = f"random, as many as {detector.label}"
            yield from self._healed({**words, "detector": label, "control": "random filter"}, victim, drawn)
        seed = derive_seed(self.seed, "part of poison")
        for part in detector.parts if self.poison else ():
            chosen = {**self.subset, "part": part, "seed": seed}
            filtered = graph.filtered("part_of_poison", chosen, inputs)
            yield from self._healed({**words, "control": part}, victim, filtered)

    def _healed(
        self, words: Values, victim: str, findings: str, detector: DetectorChoice | None = None
    ) -> Iterator[str]:
        """What was flagged: judged alone, or with what every unlearner makes of it.

        The detector can be asked again by unlearners in rounds; filters are not.
        """
        inputs = {"victim": victim, "findings": findings}
        everything = {**self.poison, **inputs, **self.start}
        if "calibration" in (made := self.graph.stages[findings].inputs):
            inputs["calibration"] = made["calibration"]
        if not self._told(True):
            yield self._row(words, inputs)
        for unlearner in self._told(True):
            seed = self._derived("heal")
            healed = self.graph.healed(unlearner, seed, self.subset, everything, detector)
            yield self._row({**words, "unlearner": unlearner.label}, {**inputs, "healed": healed})

    def _row(self, words: Values, inputs: Keys) -> str:
        plain = {"defense": "none", "detector": "none", "observation": 0, "unlearner": "none", "control": ""}
        configuration = {**self.subset, "trial": {**self.words, **plain, **words}}
        return self.graph.measured("measure", configuration, {**self.poison, **inputs})
