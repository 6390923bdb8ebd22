"""The studies: each recipe runs at a tiny size, and states the set-up that was measured before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_stages import InlineExecutor

from unpoison import attacks, defenses, detectors, unlearners
from unpoison.data import TrainingSet, write_npz
from unpoison.evaluation import Experiment, leaderboard, plan, sweep
from unpoison.training import Recipe

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "recipes/studies").glob("*.toml"))
CLASSES = {
    "sample": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag"),
        "Ankle boot",
    ),
    "cifar10": (*("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),),
}
# What makes methods quick, where they have the option.
QUICK: dict[str, Any] = {
    "steps": 1,
    "restarts": 1,
    "surrogates": 1,
    "lifetime": 1,
    "warm_up": 1,
    "last_epoch": 1,
}


def some_set(n: int, channels: int, classes: tuple[str, ...], seed: int) -> TrainingSet:
    """Classes that differ in brightness, one after the other."""
    draws = np.random.default_rng(seed)
    labels = torch.arange(n) % len(classes)
    pixels = draws.integers(0, 60, (n, channels, 8, 8)) + 18 * labels.numpy()[:, None, None, None] % 190
    return TrainingSet(torch.from_numpy(pixels.astype(np.uint8)), labels, classes, "tiny")


def quick(training: dict[str, Any]) -> dict[str, Any]:
    """The fields of a recipe, for two epochs of a narrow network."""
    small = {"epochs": 2, "width": 2, "batch_size": 16, "milestones": [], "warmup_epochs": 0}
    return {**training, **{key: value for key, value in small.items() if key in training}}


def tiny(path: Path, folder: Path) -> Experiment:
    """The recipe on 120 images of 8 x 8, with everything that takes long made small."""
    values = json.loads(json.dumps(Experiment.read(path).to_dict()))
    grey = values["data"]["source"] == "sample"
    classes = CLASSES["sample" if grey else "cifar10"]
    train, test = (some_set(n, 1 if grey else 3, classes, seed) for seed, n in enumerate((120, 40)))
    write_npz(folder / "set.npz", train, test)
    write_npz(folder / "other.npz", some_set(60, 3, ("a", "b", "c"), 2))
    per_class = 8 if values["data"]["per_class"] else None
    values |= {"folder": str(folder), "seeds": [0], "data": {"source": "set.npz", "per_class": per_class}}
    values["training"] = {**quick(values["training"]), "epochs": 2, "batch_size": 16}
    values["victims"] = [{**one, "training": quick(one["training"]), "count": 1} for one in values["victims"]]
    if values["pretraining"]:
        source = values["pretraining"]["source"] and "other.npz"
        training = quick(values["pretraining"]["training"])
        values["pretraining"] |= {"source": source, "rows": None, "training": training}
    for kind in ("attacks", "defenses", "detectors"):
        for one in values[kind]:
            one["options"] = {**one["options"], **{k: v for k, v in QUICK.items() if k in one["options"]}}
    for attack in values["attacks"]:
        attack |= {"budget": [], "budget_count": [4]}
    for detector in values["detectors"]:
        if detector["name"] == "calibrated":
            detector["options"] |= {"false_alarm_level": 0.4}
    for defense in values["defenses"]:
        defense["like"] = defense["like"] and values["defenses"][0]["name"]
    values["defenses"] = values["defenses"][:1] + [one for one in values["defenses"] if one["name"] != "epic"]
    values["targets"] = tiny_targets(values["targets"], folder)
    return Experiment.from_dict(values)


def tiny_targets(targets: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One target of the same kind."""
    if targets["setups"]:
        setup = {"target class": 2, "target index": 2, "base class": 5, "base indices": [5, 15, 25, 35]}
        (folder / "setups.json").write_text(json.dumps([setup]), encoding="utf-8")
        return {"setups": "setups.json"}
    if targets["pairs"] and targets["correct"]:
        return {"images": [{"test_index": 2, "target": target} for _, target in targets["pairs"][:1]]}
    if targets["images"]:
        return {"images": [{"test_index": 2, "target": targets["images"][0]["target"]}]}
    return {"pairs": targets["pairs"][:1]}


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.toml")), ids=lambda path: path.stem)
def test_every_option_of_a_recipe_exists(path: Path) -> None:
    experiment = Experiment.read(path)
    for choice in experiment.attacks:
        options: dict[str, Any] = dict(choice.options)
        if choice.name == "metapoison":
            options["recipe"] = experiment.surrogate_recipe(choice)
        attacks.get(choice.name, preset=choice.preset, **options)
    for methods, choices in (
        (defenses.METHODS, experiment.defenses),
        (detectors.METHODS, experiment.detectors),
        (unlearners.METHODS, experiment.unlearners),
    ):
        for one in choices:
            methods.get(one.name, preset=one.preset, **one.options)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_runs(path: Path, tmp_path: Path) -> None:
    experiment = tiny(path, tmp_path)
    results = sweep(plan(experiment), tmp_path / "store", InlineExecutor())
    assert results.failures == ()
    assert len(results.table) == results.planned
    assert {line.victim for line in leaderboard(results)} == {one.name for one in experiment.victims}


# Of every study of MetaPoison the attacks that were measured before, and under which names.
MEASURED = [
    ("metapoison-fine-tuning", 0, "fine_tuning_poisoned_trajectory"),
    ("metapoison-fine-tuning", 1, "fine_tuning_spread"),
    ("metapoison-fine-tuning", 2, "fine_tuning_watermark"),
    ("metapoison-fine-tuning-clean-trajectory", 0, "fine_tuning"),
    ("metapoison-from-scratch", 0, "from_scratch"),
    ("metapoison-from-scratch-2", 0, "from_scratch_ten"),
    ("metapoison-from-scratch-2", 0, "from_scratch_ten_transfer"),
    ("metapoison-from-scratch-2", 1, "from_scratch_separate"),
    ("metapoison-goals", 0, "self_concealment_2_poisoned_trajectory"),
    ("metapoison-goals", 1, "third_class_10"),
    ("metapoison-goals", 2, "several_classes_10"),
    ("metapoison-goals-clean-trajectory", 0, "self_concealment_2"),
    ("metapoison-goals-clean-trajectory", 1, "self_concealment_5"),
    ("metapoison-goals-clean-trajectory", 2, "third_class_4"),
    ("metapoison-goals-clean-trajectory", 3, "third_class_8"),
    ("metapoison-goals-clean-trajectory", 4, "third_class_8_spread"),
    ("metapoison-goals-clean-trajectory", 5, "third_class_cats"),
    ("metapoison-trajectories", 0, "third_class_4_clean_trajectory"),
    ("metapoison-trajectories", 1, "third_class_4_poisoned_trajectory"),
    ("metapoison-trajectories", 1, "third_class_8_poisoned_trajectory"),
]
RENAMED = {"together": "vmap_size", "depths": "loss_steps", "concentrate": "poisons_per_batch"}


@pytest.mark.parametrize(("study", "number", "name"), MEASURED)
def test_a_study_is_what_was_measured(study: str, number: int, name: str) -> None:
    path = ROOT / f"benchmarks/results/metapoison_success_{name}.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    experiment = Experiment.read(ROOT / f"recipes/studies/{study}.toml")
    assert experiment.recipe() == Recipe.from_dict(record["recipe"])
    attack = experiment.attacks[number]
    assert attack.name == "metapoison"
    assert {row["budget"] for row in record["rows"] if row["attack"] == "metapoison"} <= set(attack.budget)
    assert (attack.goal == "self-concealment") == (record["goal"] == "self-concealment")
    recipe = experiment.surrogate_recipe(attack)
    made: Any = attacks.get("metapoison", **{"recipe": recipe, **attack.options})
    expected = {RENAMED.get(key, key): value for key, value in record["metapoison"].items()}
    expected["poison_classes"] = [CLASSES["cifar10"][label] for label in expected["poison_classes"]]
    assert {**made.configuration(), "vmap_size": 1} == {**expected, "vmap_size": 1}
    words = record["command"].split()
    rows = experiment.data.rows, experiment.data.test_rows
    for option, found in zip(("--rows", "--test-rows"), rows, strict=True):
        place = words.index(option)
        assert found == (int(words[place + 1]), int(words[place + 2]))
    assert experiment.targets is not None
    assert experiment.targets.pairs == (("bird", "dog"),)
    assert experiment.targets.networks == 3
    assert int(words[words.index("--targets") + 1]) <= (experiment.targets.correct or 0)
    assert int(words[words.index("--victims") + 1]) <= experiment.victims[0].count


def test_every_kind_of_victim_that_was_measured_is_there() -> None:
    for study, _, name in MEASURED:
        path = ROOT / f"benchmarks/results/metapoison_success_{name}.json"
        record = json.loads(path.read_text(encoding="utf-8"))
        experiment = Experiment.read(ROOT / f"recipes/studies/{study}.toml")
        kinds = [
            {"model": recipe.model, **victim.training}
            for victim in experiment.victims
            for recipe in (experiment.recipe(victim),)
        ]
        for spec in {row["victim"] for row in record["rows"]}:
            model, *changes = spec.split(",")
            wanted = {key: json.loads(value) for key, value in (one.split("=") for one in changes)}
            wanted["model"] = "convnet-bn" if model == "same" else model
            assert wanted in kinds


def test_tolerances_of_votes_are_in_proportion_to_the_draws() -> None:
    found = 0
    for path in STUDIES:
        for one in Experiment.read(path).detectors:
            if one.name == "delta-influence" and "tolerance" in one.options:
                published: Any = detectors.get(one.name, preset=one.preset)
                votes = one.options.get("draws", published.draws) * one.inputs
                assert one.options["tolerance"] == round(published.tolerance * votes / published.draws)
                found += 1
    assert found
