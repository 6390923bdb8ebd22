"""The stages of a trial: craft, train, find, heal, measure. Each reads artefacts and writes one.

They are what `Stage.function` names; `_plan` says which depends on which. A stage sees nothing but its
arguments, so its artefact may be made in any process on any machine that sees the store and the data.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from unpoison import attacks, data, defenses, detectors, unlearners
from unpoison._artefacts import read_json, write_json
from unpoison._seeds import generator
from unpoison.data import TrainingSet
from unpoison.detectors import Detector, Findings, Observation, Threshold
from unpoison.errors import InputError, MismatchError, nearest
from unpoison.evaluation._experiment import (
    AttackChoice,
    DefenseChoice,
    DetectorChoice,
    UnlearnerChoice,
)
from unpoison.evaluation._measure import measure as measured
from unpoison.evaluation._results import ROW
from unpoison.threats import (
    Backdoor,
    Budget,
    Goal,
    LabelNoise,
    PatchTrigger,
    PoisonSet,
    TargetedMisclassification,
    Trigger,
)
from unpoison.training import Defense, Recipe, Trained, predict, train

Values = Mapping[str, Any]
Rows = tuple[int, int] | None
Inputs = Mapping[str, Path]
_NOTHING = "nothing"


def craft(configuration: Values, inputs: Inputs, surroundings: Values, out: Path) -> None:
    """`poison/`: the poison set of one attack on one target."""
    splits = _data(configuration, surroundings)
    choice = AttackChoice(**configuration["attack"])
    goal = goal_of(choice, configuration["target"], splits, surroundings.get("trigger", choice.trigger))
    attack = attack_of(choice, configuration["target"].get("bases", ()))
    budget = Budget.from_json(configuration["budget"])
    places = ["start"] if "start" in inputs else []
    places += [f"surrogate {number}" for number in range(configuration.get("surrogates", 0))]
    networks = [Trained.load(inputs[place] / "model", device=splits.train.device).model for place in places]
    poison = attack.craft(
        goal, splits.train, budget=budget, surrogate=networks or None, seed=configuration["seed"]
    )
    poison.save(out / "poison")


def pretrained(configuration: Values, inputs: Inputs, surroundings: Values, out: Path) -> None:
    """`model/`: the clean network that victims and surrogates start from."""
    training_set = _data({"data": configuration["pretraining"]}, surroundings).train
    recipe = Recipe.from_dict(configuration["recipe"])
    train(training_set, recipe, seed=configuration["seed"]).save(out / "model")


def victim(configuration: Values, inputs: Inputs, surroundings: Values, out: Path) -> None:
    """`model/`: trained on the poisoned set, or on the clean one where there is no poison; with a defense if
    the configuration names one; from the network they start from, if there is one. Surrogates are trained
    here too."""
    training_set = _data(configuration, surroundings).train
    if "poison" in inputs:
        training_set, _ = _poisoned(configuration, inputs, surroundings)
    recipe = Recipe.from_dict(configuration["recipe"])
    defense = None
    if "defense" in configuration:
        described = dict(configuration["defense"])
        seed = described.pop("seed")
        sizes = _sizes(inputs["like"]) if "like" in inputs else None
        defense = defense_of(DefenseChoice(**described), seed, sizes)
    start = None
    if "start" in inputs:
        start = Trained.load(inputs["start"] / "model", device=training_set.device).model
    trained = train(training_set, recipe, seed=configuration["seed"], defense=defense, model=start)
    # The network that everybody starts from is the recipe's, so it can be built again when loaded.
    dataclasses.replace(trained, own_model=False).save(out / "model")


def find(configuration: Values, inputs: Inputs, surroundings: Values, out: Path) -> None:
    """`findings/`: of a detector that is shown one answer of the victim's that the adversary wanted.

    Where the attack failed there is no such answer, hence nothing to trace and nothing flagged; detectors
    that scan the training set without one do so all the same.
    """
    training_set, poison = _poisoned(configuration, inputs, surroundings)
    test = _test(_data(configuration, surroundings))
    trained = Trained.load(inputs["victim"] / "model", device=training_set.device)
    name = configuration["detector"]["name"]
    traces = detectors.describe(name).needs_observation
    observation = noticed(trained, poison.goal, test) if traces else None
    if traces and observation is None:
        nobody = torch.empty(0, dtype=torch.int64)
        found = _filter(training_set, nobody, _NOTHING, "no test image is answered as the adversary wants")
    else:
        detector = detector_of(DetectorChoice(**configuration["detector"]), configuration["seed"])
        found = detector.find(trained.model, training_set, observation)
    found.save(out / "findings")


def random_filter(configuration: Values, inputs: Inputs, surroundings: Values, out: Path) -> None:
    """`findings/`: as many examples as a detector flagged, drawn at random."""
    training_set, _ = _poisoned(configuration, inputs, surroundings)
    count = len(Findings.load(inputs["findings"] / "findings").flagged)
    drawn = torch.randperm(len(training_set), generator=generator(configuration["seed"], "random filter"))
    _filter(training_set, drawn[:count], "random filter", f"{count} drawn at random").save(out / "findings")


def perfect_filter(configuration: Values, inputs: Inputs, surroundings: Values, out: Path) -> None:
    """`findings/`: the poison itself."""
    training_set, poison = _poisoned(configuration, inputs, surroundings)
    _filter(training_set, poison.indices, "perfect filter", "the poison itself").save(out / "findings")


def heal(configuration: Values, inputs: Inputs, surroundings: Values, out: Path) -> None:
    """`model/`: healed of what was flagged; `unchanged.json` in its place when nothing was."""
    training_set, _ = _poisoned(configuration, inputs, surroundings)
    flagged = Findings.load(inputs["findings"] / "findings").flagged
    if not len(flagged):
        write_json(out / "unchanged.json", {"why": "nothing was flagged, so the victim is left as it is"})
        return
    trained = Trained.load(inputs["victim"] / "model", device=training_set.device)
    unlearner = unlearner_of(UnlearnerChoice(**configuration["unlearner"]))
    seed = configuration["seed"]
    if "start" in inputs and isinstance(unlearner, unlearners.Retrain):
        # Exact unlearning goes back to where the victim's own training began.
        start = Trained.load(inputs["start"] / "model", device=training_set.device).model
        healed = unlearner.heal(trained, training_set, flagged, seed=seed, start=start)
        healed = dataclasses.replace(healed, own_model=False)
    else:
        healed = unlearner.heal(trained, training_set, flagged, seed=seed)
    healed.save(out / "model")


def measure(configuration: Values, inputs: Inputs, surroundings: Values, out: Path) -> None:
    """`row.parquet`: the row of one trial. Its columns `seconds_*` and `peak_bytes` are costs, not
    results."""
    training_set, poison = _poisoned(configuration, inputs, surroundings)
    test = _test(_data(configuration, surroundings))
    healed = inputs.get("healed")
    place = inputs["victim"] if healed is None or (healed / "unchanged.json").exists() else healed
    model = Trained.load(place / "model", device=training_set.device)
    dropped = _dropped(inputs["victim"], poison, len(training_set))
    result = measured(model, test, poison.goal)
    assert result.attack_success is not None
    row: dict[str, Any] = {
        **configuration["trial"],
        "clean_correct": result.clean_accuracy.successes,
        "clean_total": result.clean_accuracy.trials,
        "attack_successes": result.attack_success.successes,
        "attack_total": result.attack_success.trials,
        "class_names": list(test.class_names),
        "class_correct": [one.successes for one in result.per_class],
        "class_total": [one.trials for one in result.per_class],
        "poisons": 0 if configuration["trial"]["control"] == "no attack" else len(poison),
        "poison_share": len(poison) / len(training_set),
        **dropped,
    }
    if "findings" in inputs:
        findings = Findings.load(inputs["findings"] / "findings")
        nothing_to_trace = findings.method == _NOTHING
        scanned = findings.observation is None and not nothing_to_trace
        judgement = findings.judge(poison)
        clean = ~poison.membership(len(training_set))
        labels = training_set.labels.cpu()
        classes = training_set.num_classes
        row |= {
            "observed": None if configuration["trial"]["control"] or scanned else not nothing_to_trace,
            "flagged": len(findings.flagged),
            "caught": judgement.recall.successes,
            "clean_flagged": judgement.clean_lost.successes,
            "clean_examples": judgement.clean_lost.trials,
            "average_precision": judgement.average_precision,
            "class_clean_flagged": torch.bincount(
                labels[findings.mask() & clean], minlength=classes
            ).tolist(),
            "class_clean": torch.bincount(labels[clean], minlength=classes).tolist(),
        }
    write_row(out, row, _costs(inputs))


def right_answers(configuration: Values, inputs: Inputs, surroundings: Values, out: Path) -> None:
    """`right.json`: the test images that a network answers rightly, by class."""
    test = _test(_data(configuration, surroundings))
    trained = Trained.load(inputs["victim"] / "model", device=test.device)
    right = predict(trained.model, test.images).argmax(1) == test.labels
    by_class = [(right & (test.labels == label)).nonzero().squeeze(1) for label in range(test.num_classes)]
    write_json(
        out / "right.json",
        {"class_names": list(test.class_names), "right": [indices.tolist() for indices in by_class]},
    )


def write_row(out: Path, row: Values, costs: Values) -> None:
    """Write `row.parquet`; what the row does not say is null."""
    unknown = sorted({*row, *costs} - set(ROW.names))
    if unknown:
        raise InputError(f"a row has no column {unknown[0]!r}; {nearest(unknown[0], ROW.names)}")
    columns = {name: [row.get(name, costs.get(name))] for name in ROW.names}
    pq.write_table(
        pa.table(columns, schema=ROW), out / "row.parquet", compression="none", use_dictionary=False
    )


def goal_of(choice: AttackChoice, target: Values, splits: data.Splits, trigger: str) -> Goal:
    """What the attack is to achieve: a backdoor where it serves that, wrong answers on the source class where
    it serves those, else one test image taken for the target.

    Raises:
        InputError: the attack needs a test image and the set-up names none.
    """
    goals = attacks.describe(choice.name).goals
    if "backdoor" in goals:
        return Backdoor(trigger_of(trigger), target["source"], target["target"])
    if "label-noise" in goals:
        return LabelNoise(target["source"], target["target"])
    if target.get("test_index") is None:
        raise InputError(f"{choice.name}: needs test images; give targets.images or targets.setups")
    return TargetedMisclassification.of(_test(splits), target["test_index"], target=target["target"])


def trigger_of(spec: str) -> Trigger:
    """The trigger of that name, or the picture in that file, flush into the bottom right corner."""
    if spec == "white-corner":
        return PatchTrigger.white_corner()
    if spec == "four-pixels":
        return PatchTrigger.four_pixels()
    height, width = PatchTrigger.from_image(spec, row=0, column=0).mask.shape
    return PatchTrigger.from_image(spec, row=-height, column=-width)


def attack_of(choice: AttackChoice, bases: Iterable[int] = ()) -> attacks.Attack:
    """The attack with its options; one that has an option `bases` is given those of the set-up."""
    kind: Any = attacks.METHODS.implementation(choice.name)
    options = dict(choice.options)
    if bases and any(one.name == "bases" for one in dataclasses.fields(kind)):
        options.setdefault("bases", tuple(bases))
    return attacks.get(choice.name, **options)


def defense_of(choice: DefenseChoice, seed: int, sizes: Iterable[tuple[int, int]] | None = None) -> Defense:
    """The defense with its preset and options; for a control, how many it drops before which epoch."""
    given: dict[str, Any] = {} if sizes is None else {"sizes": tuple(sizes)}
    for key in choice.options:
        if key in ("seed", "preset", "name", *given):
            raise InputError(f"{choice.name}: {key!r} is no option of a recipe")
    kind: Any = defenses.METHODS.implementation(choice.name)
    if any(one.name == "seed" for one in dataclasses.fields(kind)):
        given["seed"] = seed
    return defenses.get(choice.name, preset=choice.preset, **choice.options, **given)


def detector_of(choice: DetectorChoice, seed: int) -> Detector:
    """The detector with its preset, options and seed."""
    preset = None if choice.preset == "default" else choice.preset
    kind: Any = detectors.METHODS.implementation(choice.name)
    given = {"seed": seed} if any(one.name == "seed" for one in dataclasses.fields(kind)) else {}
    return detectors.get(choice.name, preset=preset, **choice.options, **given)


def unlearner_of(choice: UnlearnerChoice) -> unlearners.Unlearner:
    """The unlearner with its options."""
    return unlearners.get(choice.name, **choice.options)


def noticed(trained: Trained, goal: Goal, test: TrainingSet) -> Observation | None:
    """The first of the adversary's inputs that is answered as they want, and rightly without their doing."""
    images, places = goal.victims(test)
    achieved = goal.achieved(predict(trained.model, images).argmax(1).cpu()).cpu()
    known = places.cpu() >= 0
    own = test.subset(places.cpu().clamp(min=0))
    if isinstance(goal, Backdoor):
        right = predict(trained.model, own.images).argmax(1).cpu() == own.labels.cpu()
        achieved = achieved & right
    chosen = achieved.nonzero().reshape(-1)
    if not len(chosen):
        return None
    first = int(chosen[0])
    predicted = int(predict(trained.model, images[first : first + 1]).argmax())
    return Observation(images[first].cpu(), predicted, int(own.labels[first]) if bool(known[first]) else None)


def _data(configuration: Values, surroundings: Values) -> data.Splits:
    torch.set_num_threads(surroundings["threads"])
    splits = _on_device(
        surroundings["data"],
        surroundings.get("test"),
        _pair(surroundings.get("rows")),
        _pair(surroundings.get("test_rows")),
        surroundings["device"],
    )
    if splits.train.fingerprint != configuration["data"]:
        raise MismatchError(
            f"{surroundings['data']}: the training set has changed since the sweep was planned"
        )
    return splits


@functools.lru_cache(maxsize=2)
def _on_device(source: str, test: str | None, rows: Rows, test_rows: Rows, device: str) -> data.Splits:
    return loaded(source, test, rows, test_rows).to(device)


def loaded(source: str, test: str | None, rows: Rows, test_rows: Rows) -> data.Splits:
    """The sets of an experiment, cut to the rows that it uses.

    Raises:
        InputError: they cannot be read, or have fewer rows.
    """
    splits = data.load(source, test=test)
    own = splits.test
    return data.Splits(
        _cut(splits.train, rows, "rows"), None if own is None else _cut(own, test_rows, "test_rows")
    )


def _cut(training_set: TrainingSet, rows: Rows, key: str) -> TrainingSet:
    if rows is None:
        return training_set
    if rows[1] > len(training_set):
        raise InputError(f"{key}: {training_set.name} has {len(training_set)} examples, not {rows[1]}")
    return training_set.subset(range(*rows))


def _pair(rows: Sequence[int] | None) -> Rows:
    return None if rows is None else (rows[0], rows[1])


def _test(splits: data.Splits) -> TrainingSet:
    if splits.test is None:
        raise InputError(f"{splits.train.name}: has no test set to measure on; give data.test")
    return splits.test


def _poisoned(configuration: Values, inputs: Inputs, surroundings: Values) -> tuple[TrainingSet, PoisonSet]:
    """The poisoned training set and its poison."""
    poison = PoisonSet.load(inputs["poison"] / "poison")
    return poison.apply(_data(configuration, surroundings).train), poison


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


def _sizes(victim: Path) -> list[tuple[int, int]]:
    """How many examples the defense of a victim dropped before which epoch."""
    trained = Trained.load(victim / "model")
    rounds = (trained.defense or {}).get("rounds")
    if rounds is None:
        raise InputError("like: the defense that it names drops nothing in rounds")
    # Without any the control would follow a schedule of its own.
    return [(one["epoch"], one["dropped"]) for one in rounds] or [(0, 0)]


def _dropped(victim: Path, poison: PoisonSet, examples: int) -> dict[str, int]:
    """How much a defense had dropped by the last epoch, and how much of it was poison."""
    trained = Trained.load(victim / "model")
    if trained.defense is None:
        return {}
    return {
        "dropped": len(trained.dropped),
        "dropped_poisons": int(poison.membership(examples)[trained.dropped].sum()),
        "examples": examples,
    }


def _costs(inputs: Inputs) -> dict[str, float]:
    names = {"poison": "craft", "victim": "train", "findings": "find", "healed": "heal"}
    records = {
        names[name]: read_json(place / "stage.json") for name, place in inputs.items() if name in names
    }
    costs = {f"seconds_{name}": record["seconds"] for name, record in records.items()}
    return {**costs, "peak_bytes": max(record["peak_bytes"] for record in records.values())}
