"""What recipes can ask: kinds of victims and goals, transfer, known poison, parts, observations, probes."""

from __future__ import annotations

import importlib
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_stages import InlineExecutor
from tiny_recipe import images, write_recipe

import unpoison
from unpoison import detectors
from unpoison._code import Source
from unpoison.data import write_npz, write_parquet
from unpoison.detectors import Calibration, Findings
from unpoison.errors import InputError
from unpoison.evaluation import (
    Experiment,
    Plan,
    Results,
    Stage,
    Store,
    choose_targets,
    leaderboard,
    plan,
    sweep,
)
from unpoison.threats import LInf, PoisonSet, SelfConcealment
from unpoison.training import Trained, predict

PACKAGE = Path(unpoison.__file__).parent


def tiny(tmp_path: Path, **changes: Any) -> Experiment:
    """The tiny recipe with one seed, without detectors and unlearners, and with changes."""
    values = Experiment.read(write_recipe(tmp_path)).to_dict()
    values |= {"seeds": [0], "detectors": [], "unlearners": [], "folder": str(tmp_path)}
    return Experiment.from_dict({**values, **changes})


def swept(experiment: Experiment, tmp_path: Path) -> tuple[Plan, Results]:
    work = plan(experiment)
    results = sweep(work, tmp_path / "store", InlineExecutor())
    assert results.failures == ()
    return work, results


def stages_of(work: Plan) -> dict[str, Stage]:
    return {stage.key: stage for stage in work.stages}


def test_several_kinds_of_victims_share_a_poison(tmp_path: Path) -> None:
    victims = [
        {"name": "same", "count": 2},
        {"name": "convnet", "training": {"model": "convnet", "learning_rate": 0.01}},
    ]
    work, results = swept(tiny(tmp_path, victims=victims), tmp_path)
    assert Counter(stage.kind for stage in work.stages) == {"craft": 1, "train": 6, "measure": 6}
    rows = [row for row in results.table.to_pylist() if row["control"] == "no defense"]
    assert [(row["victim"], row["number"]) for row in rows] == [("same", 0), ("same", 1), ("convnet", 0)]
    stages, store = stages_of(work), Store(results.store)
    trained = [Trained.load(store.place(stages[row["key"]].inputs["victim"]) / "model") for row in rows]
    assert [one.recipe.model for one in trained] == ["resnet9", "resnet9", "convnet"]
    assert trained[0].seed != trained[1].seed
    assert [(line.victim, line.n) for line in leaderboard(results)] == [
        ("same", 2),
        ("same", 2),
        ("convnet", 1),
        ("convnet", 1),
    ]


def test_metapoison_serves_every_goal(tmp_path: Path) -> None:
    options = {"surrogates": 1, "steps": 1, "poisons_per_batch": 4, "lifetime": 3, "perturbation": 16}
    attack = {"name": "metapoison", "budget_count": 6, "options": options}
    attacks = [
        attack,
        {**attack, "goal": "self-concealment", "options": {**options, "start": "pretrained"}},
        {**attack, "options": {**options, "poison_classes": [1]}},
    ]
    training = {"model": "convnet-bn", "width": 2, "epochs": 3, "batch_size": 32, "learning_rate": 0.05}
    experiment = tiny(
        tmp_path,
        attacks=attacks,
        training={**training, "momentum": 0.0, "nesterov": False},
        targets={"images": [{"test_index": [0, 3], "target": "right"}]},
        pretraining={"rows": [200, 300]},
        data={"source": "tiny.npz", "rows": [0, 200]},
    )
    work, results = swept(experiment, tmp_path)
    poisons = [
        PoisonSet.load(Store(results.store).place(stage.key) / "poison")
        for stage in work.stages
        if stage.kind == "craft"
    ]
    # Surrogates are trained as victims are; the two test images make one goal.
    assert {poison.configuration["recipe"]["width"] for poison in poisons} == {2}
    assert [poison.configuration["start"] for poison in poisons] == ["scratch", "pretrained", "scratch"]
    assert [sorted(set(poison.given_labels.tolist())) for poison in poisons] == [[2], [0], [1]]
    assert isinstance(poisons[1].goal, SelfConcealment)
    rows = results.table.to_pylist()
    assert {tuple(row["test_indices"]) for row in rows} == {(0, 3)}
    assert {row["attack_total"] for row in rows} == {2}
    assert [row["target"] for row in rows] == ["right"] * 2 + ["any other"] * 2 + ["right"] * 2


def test_images_of_several_classes_make_no_goal(tmp_path: Path) -> None:
    attack = {"name": "metapoison", "budget": 0.1, "options": {"lifetime": 3}}
    targets = {"images": [{"test_index": [0, 1], "target": "right"}]}
    with pytest.raises(InputError, match="test image 1 is of class 'middle', not 'left'"):
        plan(tiny(tmp_path, attacks=[attack], targets=targets))


def test_a_class_is_not_its_own_target_under_another_spelling(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="targets: the source is the target class 'left' itself"):
        plan(tiny(tmp_path, targets={"pairs": [["left", "LEFT"]]}))


@pytest.mark.parametrize("source", ["left", "Left", "0", 0])
def test_targets_may_be_chosen_by_other_networks_than_the_controls(source: str | int, tmp_path: Path) -> None:
    targets = {"pairs": [[source, "right"]], "correct": 2, "networks": 3}
    attacks = [{"name": "metapoison", "budget": 0.1, "options": {"lifetime": 3}}]
    experiment = tiny(tmp_path, targets=targets, attacks=attacks)
    chosen = choose_targets(experiment, tmp_path / "store", InlineExecutor())
    assert chosen.targets is not None
    assert [image.test_index for image in chosen.targets.images] == [(0,), (3,)]
    made = list((tmp_path / "store/artefacts").glob("*/*/model"))
    assert len(made) == 3
    assert not {stage.key for stage in plan(chosen).stages} & {path.parent.name for path in made}


def transfer(tmp_path: Path) -> Experiment:
    """Victims train a new layer on features that were learned on four other classes."""
    write_npz(tmp_path / "other.npz", images(120, 3, ("a", "b", "c", "d")))
    setups = [
        {"target class": 2, "target index": index, "base class": 0, "base indices": [0, 3, 6, 9, 150, 150]}
        for index in (5, 8)
    ]
    (tmp_path / "setups.json").write_text(json.dumps(setups))
    attack = {"name": "feature-collision", "budget_count": 6, "surrogates": 0}
    return tiny(
        tmp_path,
        data={"source": "tiny.npz", "per_class": 20},
        attacks=[
            {**attack, "preset": preset, "options": {"steps": 2}} for preset in ("released", "benchmark")
        ],
        targets={"setups": "setups.json"},
        pretraining={"source": "other.npz", "freeze": True, "training": {"epochs": 1}},
        victims=[
            {"name": "fitted", "training": {"epochs": 20, "learning_rate": 0.1}},
            {"name": "other", "training": {"model": "convnet-bn", "flip": True}},
        ],
        training={"model": "resnet9", "width": 4, "epochs": 2, "batch_size": 32, "weight_decay": 0.0},
    )


def test_a_new_layer_is_trained_on_a_frozen_network(tmp_path: Path) -> None:
    work, results = swept(transfer(tmp_path), tmp_path)
    rows, stages, store = results.table.to_pylist(), stages_of(work), Store(results.store)
    assert {row["attack"] for row in rows} == {
        "feature-collision (benchmark)",
        "feature-collision (released)",
    }
    # A network of each architecture is pretrained once; controls differ by the set-up's bases.
    assert len([stage for stage in work.stages if stage.kind == "train" and not stage.inputs]) == 2
    for row in rows:
        inputs = stages[row["key"]].inputs
        victim = Trained.load(store.place(inputs["victim"]) / "model")
        start = Trained.load(store.place(stages[inputs["victim"]].inputs["start"]) / "model")
        assert victim.recipe.model == start.recipe.model
        assert (len(victim.class_names), len(start.class_names)) == (3, 4)
        after, before = victim.model.state_dict(), start.model.state_dict()
        changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
        assert len(changed) == 2  # weight and bias of the last layer, and no running statistics
        poison = PoisonSet.load(store.place(inputs["poison"]) / "poison")
        # 20 of each class, the five bases at the end; the pool of the other classes is untouched.
        assert poison.indices.tolist() == [55, 56, 57, 58, 59]
        assert victim.history[0].examples == 60
    fitted = [row for row in rows if row["victim"] == "fitted" and row["control"] == "no attack"]
    assert all(row["clean_correct"] > 50 for row in fitted)
    assert {row["poisons"] for row in rows if row["control"] == "no defense"} == {5}


def test_too_few_examples_of_a_class_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"per_class: .* has 100 examples of class 'left', not 101"):
        plan(tiny(tmp_path, data={"source": "tiny.npz", "per_class": 101}))


def test_known_poison_is_put_right_before_training(tmp_path: Path) -> None:
    attacks = [{"name": "badnets", "budget_count": 20, "known": [0.0, 0.5, 0.9]}]
    work, results = swept(tiny(tmp_path, attacks=attacks), tmp_path)
    lines = [line for line in leaderboard(results) if line.control == "no defense"]
    assert [line.attack for line in lines] == ["badnets", "badnets, 50 % known", "badnets, 90 % known"]
    assert [line.rows[0]["poisons"] for line in lines] == [20, 10, 2]
    stages, store = stages_of(work), Store(results.store)
    whole, half, _ = (
        PoisonSet.load(store.place(stages[line.rows[0]["key"]].inputs["poison"]) / "poison") for line in lines
    )
    assert set(half.indices.tolist()) < set(whole.indices.tolist())


def test_parts_of_the_poison_are_left_out_in_turn(tmp_path: Path) -> None:
    parts = ["detected", "undetected", "random poison", "first half", "last half", "random half"]
    detectors = [{"name": "ek-fac", "options": {"threshold": 0.02}, "parts": parts}]
    unlearners = [{"name": "fine-tune", "options": {"lose_classes": True, "layers": 1}}]
    _, results = swept(tiny(tmp_path, detectors=detectors, unlearners=unlearners), tmp_path)
    rows = {row["control"]: row for row in results.table.to_pylist()}
    assert set(rows) == {"no attack", "no defense", "", "random filter", "perfect filter", *parts}
    assert all(row["false_positives"] == 0 for part, row in rows.items() if part in parts)
    assert rows["detected"]["flagged"] == rows[""]["true_positives"]
    assert rows["detected"]["flagged"] + rows["undetected"]["flagged"] == 30
    assert rows["random poison"]["flagged"] == rows["detected"]["flagged"]
    assert [rows[part]["flagged"] for part in parts[3:]] == [15, 15, 15]


def test_several_observations_of_several_inputs_are_traced(tmp_path: Path) -> None:
    detectors = [{"name": "ek-fac", "observations": 3, "inputs": inputs} for inputs in (1, 2)]
    work, results = swept(tiny(tmp_path, detectors=detectors), tmp_path)
    rows = [row for row in results.table.to_pylist() if row["detector"].startswith("ek-fac")]
    found = [(row["detector"], row["observation"]) for row in rows]
    assert found == [(label, number) for label in ("ek-fac", "ek-fac (inputs 2)") for number in range(3)]
    stages, store = stages_of(work), Store(results.store)
    observations = [
        Findings.load(store.place(stages[row["key"]].inputs["findings"]) / "findings").observation
        for row in rows
    ]
    pictures = [one.images for one in observations if one is not None]
    assert [len(one) for one in pictures] == [1, 1, 1, 2, 2, 2]
    assert torch.equal(torch.cat(pictures[:3]), torch.cat(pictures[3:])[:3])
    [line, _] = [line for line in leaderboard(results) if line.detector.startswith("ek-fac")]
    assert line.n == 3


def test_a_network_is_calibrated_once_for_all_its_answers(tmp_path: Path) -> None:
    write_parquet(tmp_path / "series.parquet", images(300, 0))
    write_parquet(tmp_path / "held-test.parquet", images(120, 1))
    data = {
        "source": "series.parquet",
        "test": "held-test.parquet",
        "test_rows": [0, 60],
        "reference_rows": [60, 120],
        "groups": r"^.*(?=.\.png)",  # ten images in a row: 0 to 9, 10 to 19, ...
    }
    asked = {"name": "calibrated", "options": {"false_alarm_level": 0.2}, "random_filter": False}
    detectors = [asked, {**asked, "answers": "right", "observations": 2}]
    experiment = tiny(tmp_path, data=data, detectors=detectors, targets={"pairs": [["*", "right"]]})
    work, results = swept(experiment, tmp_path)
    kinds = Counter(stage.kind for stage in work.stages)
    assert (kinds["train"], kinds["calibrate"], kinds["find"]) == (2, 1, 4)
    [made] = [stage for stage in work.stages if stage.kind == "calibrate"]
    calibration = Calibration.load(Store(results.store).place(made.key) / "calibration")
    assert calibration.held_out
    assert calibration.near.groups is not None
    assert torch.equal(calibration.near.groups.unique(return_counts=True)[1], torch.full((30,), 10))
    rows = results.table.to_pylist()
    assert {row["source"] for row in rows} == {"any other"}
    traced = [row for row in rows if row["detector"].startswith("calibrated")]
    assert len(traced) == 3
    assert all(row["seconds_calibrate"] > 0 and row["cause"] for row in traced if row["p_value"] is not None)
    assert not any(row["control"] == "random filter" for row in rows)
    with pytest.raises(InputError, match=r"groups: 'track' does not match the path '0.png' of an image"):
        plan(tiny(tmp_path, data={**data, "groups": "track"}))
    with pytest.raises(InputError, match=r"groups: 'track' does not match the path '10.png' of an image"):
        plan(tiny(tmp_path, data={**data, "groups": "track", "rows": [10, 300]}))
    with pytest.raises(InputError, match="groups: not a regular expression"):
        tiny(tmp_path, data={**data, "groups": "("})
    with pytest.raises(InputError, match="correct: chooses test images of one class"):
        tiny(tmp_path, targets={"pairs": [["*", "right"]], "correct": 2})


def test_goals_of_all_classes_have_a_pair_of_their_own(tmp_path: Path) -> None:
    chosen = [
        {"name": "badnets", "budget": [0.1]},
        {"name": "badnets", "budget": [0.3], "goal": "all-to-all"},
        {"name": "tap", "budget": [1.0], "options": {"steps": 1, "shift": 1}},
    ]
    pairs = {"pairs": [["left", "right"], ["*", "*"]]}
    training = {"model": "convnet", "width": 4, "epochs": 1, "batch_size": 32, "learning_rate": 0.05}
    experiment = tiny(tmp_path, attacks=chosen, targets=pairs, training=training)
    work, results = swept(experiment, tmp_path)
    # Each attack for the pair that its goal can have: a clean victim, a surrogate and three poisoned victims.
    assert Counter(stage.kind for stage in work.stages) == {"craft": 3, "train": 5, "measure": 6}
    rows = {row["attack"]: row for row in results.table.to_pylist() if row["control"] == "no defense"}
    described = sorted((row["source"], row["target"], row["attack_total"]) for row in rows.values())
    assert described == [("any other", "any other", 60), ("any other", "the next", 60), ("left", "right", 20)]
    [available] = [row for row in rows.values() if row["target"] == "any other"]
    assert available["attack_successes"] == available["clean_total"] - available["clean_correct"]
    assert available["poisons"] == 300
    with pytest.raises(InputError, match=r"goal 'backdoor' of badnets needs a target class among the pairs"):
        plan(tiny(tmp_path, targets={"pairs": [["*", "*"]]}))
    with pytest.raises(InputError, match=r"goal 'availability' of tap needs \["):
        plan(tiny(tmp_path, attacks=chosen[2:], targets={"pairs": [["left", "right"]]}))


def test_false_alarms_are_counted_on_clean_victims(tmp_path: Path) -> None:
    detectors = [
        {"name": "ek-fac", "answers": answers, "observations": 4, "options": {"threshold": 1e9}}
        for answers in ("errors", "right")
    ]
    # So little training that there are errors.
    experiment = tiny(
        tmp_path,
        attacks=[],
        targets=None,
        detectors=detectors,
        training={"model": "convnet", "width": 2, "epochs": 1, "batch_size": 64, "learning_rate": 0.001},
    )
    work, results = swept(experiment, tmp_path)
    rows, stages, store = results.table.to_pylist(), stages_of(work), Store(results.store)
    traced = [row for row in rows if row["detector"].startswith("ek-fac")]
    assert len(traced) == 8
    for row in traced:
        assert (row["attack"], row["control"], row["poisons"]) == ("none", "", 0)
        assert row["attack_total"] is None
        assert row["found"] is False
        assert row["true_positives"] == row["flagged"] == 0
        inputs = stages[row["key"]].inputs
        observation = Findings.load(store.place(inputs["findings"]) / "findings").observation
        assert observation is not None
        model = Trained.load(store.place(inputs["victim"]) / "model").model
        assert predict(model, observation.images).argmax(1).tolist() == [observation.predicted]
        assert (observation.true_label is None) == ("right" in row["detector"])
    lines = [line for line in leaderboard(results) if line.detector.startswith("ek-fac")]
    assert [(line.found.successes, line.found.trials) for line in lines] == [(0, 4), (0, 4)]


def test_errors_of_poisoned_victims_are_those_the_adversary_does_not_want(tmp_path: Path) -> None:
    training = {"model": "convnet", "width": 2, "epochs": 1, "batch_size": 64, "learning_rate": 0.002}
    detectors = [{"name": "ek-fac", "answers": "errors", "observations": 2}]
    targets = {"pairs": [["right", "left"]]}
    experiment = tiny(tmp_path, detectors=detectors, training=training, targets=targets)
    work, results = swept(experiment, tmp_path)
    rows = [row for row in results.table.to_pylist() if row["detector"].startswith("ek-fac")]
    stages, store = stages_of(work), Store(results.store)
    for row in rows:
        findings = Findings.load(store.place(stages[row["key"]].inputs["findings"]) / "findings")
        if findings.observation is not None:
            assert findings.observation.predicted not in (0, findings.observation.true_label)
    assert any(row["observed"] for row in rows)


def test_a_probe_changes_nothing_and_notes_every_epoch(tmp_path: Path) -> None:
    defenses = [{"name": "random-drop", "options": {"sizes": [[1, 40], [2, 20]]}}]
    plain, expected = swept(tiny(tmp_path, defenses=defenses), tmp_path)
    probe = ["logits", "gradients", "norms"]
    work, results = swept(tiny(tmp_path, defenses=defenses, probe=probe, name="probed"), tmp_path)
    assert results.deterministic.drop_columns("key").equals(expected.deterministic.drop_columns("key"))
    assert len(plain.stages) == len(work.stages)
    stages, store = stages_of(work), Store(results.store)
    rows = {row["control"]: row for row in results.table.to_pylist()}
    noted = {
        control: json.loads((store.place(stages[row["key"]].inputs["victim"]) / "probe.json").read_text())
        for control, row in rows.items()
    }
    assert set(noted) == {"no attack", "no defense", ""}
    for notes in noted.values():
        assert len(notes["epochs"]) == 4  # before each of three epochs, and at the end
        assert all(len(note["logits"]) == 3 for note in notes["epochs"])
    dropped = [note["dropped"] for note in noted[""]["epochs"]]
    assert [round(300 * (0.1 * one["poisons"] + 0.9 * one["clean"])) for one in dropped] == [0, 40, 60, 60]
    for control, notes in noted.items():
        final = notes["epochs"][-1]
        assert final["achieved"] == rows[control]["attack_successes"] / 20
        assert (final["difference"] > 0) == (control == "")
        assert final["gradient"] > 0


def test_an_edit_of_a_detector_makes_its_findings_anew_and_nothing_else(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "unpoison", ignore=shutil.ignore_patterns("__pycache__"))
    detectors = [{"name": name} for name in ("ek-fac", "trak", "deep-knn")]
    experiment = tiny(tmp_path, detectors=detectors, unlearners=[{"name": "retrain"}])
    before = plan(experiment, source=Source(tmp_path))
    assert {stage.key for stage in plan(experiment).stages} == {stage.key for stage in before.stages}

    def changed(module: str) -> Counter[str]:
        path = tmp_path / "unpoison" / module
        text = path.read_text(encoding="utf-8")
        path.write_text(f"{text}\nEXTRA = 1\n", encoding="utf-8")
        known = {stage.key for stage in before.stages}
        fresh = [
            stage for stage in plan(experiment, source=Source(tmp_path)).stages if stage.key not in known
        ]
        path.write_text(text, encoding="utf-8")
        return Counter(stage.kind for stage in fresh)

    # Its findings, the random filter as large, what is healed of both, and their two rows.
    assert changed("detectors/trak.py") == {"find": 2, "heal": 2, "measure": 2}
    assert changed("unlearners/retrain.py") == {"heal": 7, "measure": 7}
    assert changed("attacks/sig.py") == {}
    assert changed("attacks/badnets.py")["craft"] == 1
    assert changed("evaluation/_probe.py") == {}
    assert "train" not in changed("evaluation/_metrics.py")


def test_records_say_which_code_made_an_artefact(tmp_path: Path) -> None:
    work, results = swept(tiny(tmp_path), tmp_path)
    for stage in work.stages:
        record = Store(results.store).record(stage.key)
        assert record["code"] == stage.code != ""
        assert record["commit"]


def test_rows_of_another_version_are_refused(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    work, results = swept(tiny(tmp_path), tmp_path)
    shutil.rmtree(tmp_path / "store/tables")
    path = Store(results.store).place(work.rows[0]) / "row.parquet"
    table = pq.ParquetFile(path).read()
    names = [name.replace("margin", "old") for name in table.column_names]
    pq.write_table(table.rename_columns(names), path)
    with pytest.raises(InputError, match="its columns are those of another version"):
        Results.read(tmp_path / "store")


PLUGIN = """
import torch
from dataclasses import dataclass
from unpoison.detectors import Detector, Findings, Threshold, register

@register(name="first-examples", title="First", summary="Flags the first.", paper="ours", cost="none")
@dataclass(frozen=True, kw_only=True)
class FirstExamples(Detector):
    count: int = 3

    def find(self, model, training_set, observation=None, *, reference=None, seed=0, progress=None):
        scores = -torch.arange(len(training_set)).double()
        return Findings(
            method="first-examples", configuration={}, fingerprint=training_set.fingerprint,
            labels=training_set.labels, class_names=training_set.class_names, scores=scores,
            flagged=torch.arange(self.count), threshold=Threshold(-self.count, "as asked"),
            poison_found=True, p_value=None, summary="the first",
        )
"""


def test_a_detector_of_another_package_takes_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    methods: Any = detectors.METHODS
    for name in ("_classes", "_methods"):  # a registration that ends with the test
        monkeypatch.setattr(methods, name, dict(getattr(methods, name)))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "first_examples.py").write_text(PLUGIN, encoding="utf-8")
    importlib.import_module("first_examples")
    choice = {"name": "first-examples", "options": {"count": 7}}
    work, results = swept(tiny(tmp_path, detectors=[choice]), tmp_path)
    [row] = [row for row in results.table.to_pylist() if row["detector"] == "first-examples (count 7)"]
    assert (row["flagged"], row["found"]) == (7, True)
    # Its source counts, too.
    path = tmp_path / "first_examples.py"
    path.write_text(PLUGIN.replace("count: int = 3", "count: int = 4"), encoding="utf-8")
    again = plan(tiny(tmp_path, detectors=[choice]))
    fresh = Counter(stage.kind for stage in again.stages if stage.key not in stages_of(work))
    assert fresh == {"find": 2, "measure": 2}


def test_a_craft_that_is_killed_goes_on_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"surrogates": 1, "steps": 4, "poisons_per_batch": 4, "lifetime": 3, "perturbation": 16}
    experiment = tiny(
        tmp_path,
        attacks=[{"name": "metapoison", "budget_count": 6, "options": options}],
        targets={"images": [{"test_index": 0, "target": "right"}]},
        training={"model": "convnet-bn", "width": 2, "epochs": 3, "batch_size": 64, "learning_rate": 0.05},
    )
    project, calls, fatal = LInf.project, [0], 0

    def counted(self: LInf, *arguments: Any) -> Any:
        calls[-1] += 1
        if calls[-1] == fatal:
            raise KeyboardInterrupt
        return project(self, *arguments)

    monkeypatch.setattr(LInf, "project", counted)
    _, expected = swept(experiment, tmp_path / "whole")
    calls, fatal = [*calls, 0], calls[0] - 1
    with pytest.raises(KeyboardInterrupt):
        swept(experiment, tmp_path)
    calls, fatal = [*calls, 0], 0
    _, results = swept(experiment, tmp_path)
    assert calls[2] < calls[0]  # the steps before the last but one were in the checkpoint
    assert results.fingerprint == expected.fingerprint
    assert not list((tmp_path / "store/checkpoints").iterdir())
