"""The stages of a trial: craft, train, calibrate, find, screen, heal, measure. Each reads artefacts and
writes one.

They are what `Stage.function` names; `_plan` says which depends on which. A stage sees nothing but its
arguments, so its artefact may be made in any process on any machine that sees the store and the data. What
they do is done by `unpoison.workflow` and by `unpoison.repair`, which is made of it.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from unpoison import attacks, defenses, detectors, input_detectors, unlearners, workflow
from unpoison._artefacts import write_json
from unpoison._repair import repair
from unpoison._seeds import generator
from unpoison.data import TrainingSet
from unpoison.detectors import Calibration, Findings, Observation, Threshold
from unpoison.errors import InputError
from unpoison.evaluation._gaussian import ATTACK, gaussian_unlearning_score
from unpoison.evaluation._probe import Probe, Undefended
from unpoison.evaluation._rows import (
    NOTHING,
    answers,
    costs,
    dropped,
    healing,
    judged,
    screened,
    write_row,
)
from unpoison.evaluation._stage_data import StageData, goal_of
from unpoison.evaluation._transfer import finished, starting_network
from unpoison.registry import Registry
from unpoison.threats import Budget, PoisonSet
from unpoison.training import Defense, Recipe, Trained, predict

Values = Mapping[str, Any]
Inputs = Mapping[str, Path]
T = TypeVar("T")


def craft(configuration: Values, inputs: Inputs, surroundings: Values, out: Path) -> None:
    """`poison/`: the poison set of one attack on one target."""
    examples = StageData.of(configuration, surroundings)
    goal = goal_of(configuration["goal"], examples.test, surroundings.get("trigger"))
    places = sorted(inputs, key=lambda name: (name != "start", len(name), name))
    networks = [Trained.load(inputs[place] / "model", device=examples.device) for place in places]
    poison = workflow.craft(
        _method(attacks.METHODS, configuration["attack"]),
        goal,
        examples.training_set,
        budget=Budget.from_json(configuration["budget"]),
        surrogates=networks or None,
        seed=configuration["seed"],
        checkpoints=surroundings.get("checkpoints"),
    )
    poison.save(out / "poison")


def corrected(configuration: Values, inputs: Inputs, surroundings: Values, out: Path) -> None:
    """`poison/`: what is left of a poison set when a share of it, drawn at random, has been put right."""
    poison = PoisonSet.load(inputs["poison"] / "poison")
    order = torch.randperm(len(poison), generator=generator(configuration["seed"], "known"))
    left = order[round(configuration["known"] * len(poison)) :].sort().values
    tensors = ("indices", "images", "clean_labels", "given_labels", "linf", "l2")
    rest = dataclasses.replace(poison, **{name: getattr(poison, name)[left] for name in tensors})
    rest.save(out / "poison")


def victim(configuration: Values, inputs: Inputs, surroundings: Values, out: Path) -> None:
    """`model/`: trained on the poisoned set, or on the clean one where there is no poison.

    With a defense if the configuration names one; from the pretrained network, if there is one. That network
    itself and surrogates are trained here too. With a probe, `probe.json` says what it noted.
    """
    examples = StageData.of(configuration, surroundings)
    recipe, seed = Recipe.from_dict(configuration["recipe"]), configuration["seed"]
    poison = PoisonSet.load(inputs["poison"] / "poison") if "poison" in inputs else None
    defense: Defense | None = None
    if "defense" in configuration:
        copied = {"sizes": _sizes(inputs["like"])} if "like" in inputs else {}
        defense = _method(defenses.METHODS, configuration["defense"], **copied)
    probe = None
    if "probe" in configuration:
        assert poison is not None
        defense = probe = Probe(defense or Undefended(), poison, examples.test, tuple(configuration["probe"]))
    trained = workflow.train(
        examples.training_set,
        recipe,
        poison=None if configuration.get("clean") else poison,
        defense=defense,
        start=_start(configuration, inputs, examples, recipe, seed),
        seed=seed,
    )
    trained = finished(trained)
    trained.save(out / "model")
    if probe is not None:
        write_json(out / "probe.json", {"epochs": probe.notes_until(trained)})


def calibrate(configuration: Values, inputs: Inputs, surroundings: Values, out: Path) -> None:
    """`calibration/`: of a victim, for every observation that is traced."""
    examples = StageData.of(configuration, surroundings)
    training_set, _ = _poisoned(inputs, examples)
    calibration = workflow.calibrate(
        Trained.load(inputs["victim"] / "model", device=examples.device),
        training_set,
        examples.reference,
        method=_method(detectors.METHODS, configuration["detector"]),
        groups=examples.groups,
        seed=configuration["seed"],
    )
    calibration.save(out / "calibration")


def find(configuration: Values, inputs: Inputs, surroundings: Values, out: Path) -> None:
    """`findings/`: of a detector that is shown one observation of the victim.

    Where there is no such observation, because the attack failed, say, there is nothing to trace and nothing
    is flagged. Detectors that scan the training set need none.
    """
    examples = StageData.of(configuration, surroundings)
    training_set, poison = _poisoned(inputs, examples)
    trained = Trained.load(inputs["victim"] / "model", device=examples.device)
    calibration = None
    if "calibration" in inputs:
        calibration = Calibration.load(inputs["calibration"] / "calibration")
    asked: dict[str, Any] = {
        "method": _method(detectors.METHODS, configuration["detector"]),
        "reference": examples.reference if "reference" in configuration else None,
        "seed": configuration["seed"],
    }
    shown = configuration.get("observation")
    observation = None if shown is None else _observation(trained, examples.test, poison, shown)
    if shown is None:
        found = workflow.scan(trained, training_set, **asked)
    elif observation is not None:
        found = workflow.trace(trained, training_set, observation, calibration=calibration, **asked)
    else:
        nothing = torch.empty(0, dtype=torch.int64)
        found = _filter(training_set, nothing, NOTHING, "the victim gives no answer to trace")
    found.save(out / "findings")


def screen(configuration: Values, inputs: Inputs, surroundings: Values, out: Path) -> None:
    """`clean/` and `triggered/`: what a test-time detector says of test images.

    Triggered are those of the adversary's inputs that are answered as the adversary wants; there is no
    `triggered/` where there are none.
    """
    examples = StageData.of(configuration, surroundings)
    _, poison = _poisoned(inputs, examples)
    trained = Trained.load(inputs["victim"] / "model", device=examples.device)
    assert examples.reference is not None
    asked = {
        "method": _method(input_detectors.METHODS, configuration["input_detector"]),
        "seed": configuration["seed"],
    }
    shown = {"clean": examples.test.images[: configuration["clean"]]}
    if poison is not None:
        images, _ = poison.goal.victims(examples.test)
        hits = poison.goal.achieved(predict(trained.model, images).argmax(1).cpu()).to(images.device)
        shown["triggered"] = images[hits][: configuration["triggered"]]
    for name, images in shown.items():
        if len(images):
            workflow.screen(trained, images, examples.reference, **asked).save(out / name)


def random_filter(configuration: Values, inputs: Inputs, surroundings: Values, out: Path) -> None:
    """`findings/`: as many examples as a detector flagged, drawn at random."""
    training_set, _ = _poisoned(inputs, StageData.of(configuration, surroundings))
    count = len(Findings.load(inputs["findings"] / "findings").flagged)
    drawn = torch.randperm(len(training_set), generator=generator(configuration["seed"], "random filter"))
    _filter(training_set, drawn[:count], "random filter", f"{count} drawn at random").save(out / "findings")


def part_of_poison(configuration: Values, inputs: Inputs, surroundings: Values, out: Path) -> None:
    """`findings/`: a part of the poison, as a detector sees it; without a detector a share of it."""
    training_set, poison = _poisoned(inputs, StageData.of(configuration, surroundings))
    assert poison is not None
    part, share = configuration["part"], configuration.get("share")
    chosen = poison.indices
    if share is not None:
        order = torch.randperm(len(poison), generator=generator(configuration["seed"], "discovered"))
        chosen = poison.indices[order[: max(1, round(share * len(poison)))]]
    if part is not None:
        findings = Findings.load(inputs["findings"] / "findings")
        order = torch.randperm(len(poison), generator=generator(configuration["seed"], "part of poison"))
        half = len(poison) // 2
        flagged = findings.mask()[poison.indices]
        ranked = findings.ranking()[torch.isin(findings.ranking(), poison.indices)]
        chosen = {
            "detected": poison.indices[flagged],
            "undetected": poison.indices[~flagged],
            "random poison": poison.indices[order[: int(flagged.sum())]],
            "first half": ranked[:half],
            "last half": ranked[half:],
            "random half": poison.indices[order[:half]],
        }[part]
    name = "perfect filter" if part is None else part
    _filter(training_set, chosen, name, "the poison itself, or a part of it").save(out / "findings")


def heal(configuration: Values, inputs: Inputs, surroundings: Values, out: Path) -> None:
    """`model/`: healed of what was flagged; `unchanged.json` in its place when nothing was.

    A method that needs no findings is given none, and clean examples if it makes use of some.
    """
    examples = StageData.of(configuration, surroundings)
    training_set, _ = _poisoned(inputs, examples)
    findings = Findings.load(inputs["findings"] / "findings") if "findings" in inputs else None
    if findings is not None and not len(findings.flagged):
        _unchanged(out)
        return
    trained = Trained.load(inputs["victim"] / "model", device=examples.device)
    seed = configuration["seed"]
    assert trained.recipe is not None
    healed = workflow.heal(
        trained,
        training_set,
        findings,
        method=_method(unlearners.METHODS, configuration["unlearner"]),
        reference=examples.reference if "reference" in configuration else None,
        # Exact unlearning goes back to where the victim's own training began.
        start=_start(configuration, inputs, examples, trained.recipe, seed),
        seed=seed,
    )
    finished(healed).save(out / "model")


def repaired(configuration: Values, inputs: Inputs, surroundings: Values, out: Path) -> None:
    """`repair.json`, and `model/`: healed and traced again in rounds, of which the findings are the first.

    `unchanged.json` is written in place of the model when nothing was flagged.
    """
    examples = StageData.of(configuration, surroundings)
    training_set, _ = _poisoned(inputs, examples)
    findings = Findings.load(inputs["findings"] / "findings")
    if findings.observation is None:
        write_json(out / "repair.json", {"outcome": "nothing found", "rounds": 0, "removed": []})
        _unchanged(out)
        return
    trained = Trained.load(inputs["victim"] / "model", device=examples.device)
    seed = configuration["seed"]
    assert trained.recipe is not None
    done = repair(
        trained,
        training_set,
        findings.observation,
        method=_method(detectors.METHODS, configuration["detector"]),
        unlearner=_method(unlearners.METHODS, configuration["unlearner"]),
        rounds=configuration["rounds"],
        start=_start(configuration, inputs, examples, trained.recipe, seed),
        reference=examples.reference if "reference" in configuration else None,
        findings=findings,
        groups=examples.groups if "groups" in configuration else None,
        seed=seed,
    )
    record = {"outcome": done.outcome, "rounds": len(done.rounds) - 1, "removed": done.removed.tolist()}
    traces = [{"p_value": one.findings.p_value, "flagged": len(one.flagged)} for one in done.rounds]
    write_json(out / "repair.json", {**record, "summary": done.summary, "traces": traces})
    if not len(done.removed):
        _unchanged(out)
        return
    assert isinstance(done.model, Trained)
    finished(done.model).save(out / "model")


def measure(configuration: Values, inputs: Inputs, surroundings: Values, out: Path) -> None:
    """`row.parquet`: the row of one trial."""
    examples = StageData.of(configuration, surroundings)
    training_set, poison = _poisoned(inputs, examples)
    words = configuration["trial"]
    healed = inputs.get("healed")
    place = inputs["victim"] if healed is None or (healed / "unchanged.json").exists() else healed
    model = Trained.load(place / "model", device=examples.device)
    result = workflow.measure(model, examples.test, None if poison is None else poison.goal)
    row: dict[str, Any] = {
        **words,
        "clean_correct": result.clean_accuracy.successes,
        "clean_total": result.clean_accuracy.trials,
        "class_names": list(examples.test.class_names),
        "class_correct": [one.successes for one in result.per_class],
        "class_total": [one.trials for one in result.per_class],
        "certified": [one.successes for one in result.certified] or None,
        "poisons": 0,
    }
    if poison is not None:
        assert result.attack_success is not None
        row |= {
            "attack_successes": result.attack_success.successes,
            "attack_total": result.attack_success.trials,
            **answers(model, poison.goal, examples.test),
            "poisons": 0 if words["control"] == "no attack" else len(poison),
            "poison_share": len(poison) / len(training_set),
        }
        if poison.attack == ATTACK:
            memory = gaussian_unlearning_score(model, examples.training_set, poison)
            row |= {
                "noise_score": memory.score,
                "noise_remembered": memory.remembered.successes,
                "noise_total": memory.remembered.trials,
            }
    if words["defense"] != "none":
        row |= dropped(inputs["victim"], poison, len(training_set))
    if "findings" in inputs:
        row |= judged(Findings.load(inputs["findings"] / "findings"), poison, training_set, words["control"])
    if "screening" in inputs:
        row |= screened(inputs["screening"])
    if healed is not None and (healed / "repair.json").exists():
        row |= healing(healed, poison)
    write_row(out, row, costs(inputs))


def right_answers(configuration: Values, inputs: Inputs, surroundings: Values, out: Path) -> None:
    """`right.json`: the test images that a network predicts correctly, by class."""
    test = StageData.of(configuration, surroundings).test
    trained = Trained.load(inputs["victim"] / "model", device=test.device)
    right = predict(trained.model, test.images).argmax(1) == test.labels
    by_class = [(right & (test.labels == label)).nonzero().squeeze(1) for label in range(test.num_classes)]
    write_json(
        out / "right.json",
        {"class_names": list(test.class_names), "right": [indices.tolist() for indices in by_class]},
    )


def _method(methods: Registry[T], described: Values, **options: Any) -> T:
    """The method of a configuration, with some other options."""
    return methods.get(described["name"], preset=described["preset"], **{**described["options"], **options})


def _unchanged(out: Path) -> None:
    write_json(out / "unchanged.json", {"why": "nothing was flagged, so the victim is left as it is"})


def _start(
    configuration: Values, inputs: Inputs, examples: StageData, recipe: Recipe, seed: int
) -> torch.nn.Module | None:
    """The network that a training begins with; None from scratch."""
    if "start" not in inputs:
        return None
    trained = Trained.load(inputs["start"] / "model", device=examples.device)
    return starting_network(
        trained, examples.training_set, recipe, seed=seed, freeze=configuration.get("freeze", False)
    )


def _poisoned(inputs: Inputs, examples: StageData) -> tuple[TrainingSet, PoisonSet | None]:
    """What victims were trained on, and its poison if there is one."""
    if "poison" not in inputs:
        return examples.training_set, None
    poison = PoisonSet.load(inputs["poison"] / "poison")
    return poison.apply(examples.training_set), poison


def _observation(
    trained: Trained, test: TrainingSet, poison: PoisonSet | None, asked: Values
) -> Observation | None:
    """The observation of that number; None where the victim gives no such answer any more.

    Answers that the adversary wants are taken in the order of the test set, others in an order that is drawn
    at random, once for all victims.
    """
    count, number, goal = asked["inputs"], asked["number"], None if poison is None else poison.goal
    if asked["answers"] == "attack":
        assert goal is not None
        whole = workflow.observe(trained, goal, test, count=count * (number + 1))
        if whole is None or len(whole) < count * (number + 1):
            return None
        return Observation(whole.images[count * number :], whole.predicted, whole.true_label)
    order = torch.randperm(len(test), generator=generator(0, "observations")).to(test.device)
    predicted = predict(trained.model, test.images[order]).argmax(1)
    labels = test.labels[order]
    chosen = predicted == labels if asked["answers"] == "right" else predicted != labels
    if goal is not None:
        chosen &= ~goal.achieved(predicted.cpu(), labels.cpu()).to(test.device)
    # The inputs of one observation are answered alike and are of one class.
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for place in chosen.nonzero().reshape(-1).tolist():
        answer, own = int(predicted[place]), int(labels[place])
        group = groups[answer, own]
        group.append(place)
        if len(group) == count:
            if not number:
                return Observation(test.images[order[group]].cpu(), answer, None if answer == own else own)
            number -= 1
            group.clear()
    return None


def _filter(training_set: TrainingSet, flagged: Tensor, name: str, how: str) -> Findings:
    scores = torch.zeros(len(training_set), dtype=torch.float64)
    scores[flagged] = 1.0
    return Findings(
        method=name,
        configuration={},
        fingerprint=training_set.fingerprint,
        labels=training_set.labels.cpu(),
        class_names=training_set.class_names,
        scores=scores,
        flagged=flagged,
        threshold=Threshold(0.5, how),
        poison_found=bool(len(flagged)),
        p_value=None,
        summary=how,
    )


def _sizes(victim: Path) -> tuple[tuple[int, int], ...]:
    """How many examples the defense of a victim dropped before which epoch."""
    rounds = (Trained.load(victim / "model").defense or {}).get("rounds")
    if rounds is None:
        raise InputError("like: the defense that it names drops nothing in rounds")
    # Without any round the control would follow a schedule of its own.
    return tuple((one["epoch"], one["dropped"]) for one in rounds) or ((0, 0),)
