"""The real stages on a tiny data set: what depends on what, what rows say, and that workers agree."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_matching import FakeMatching, fake_matching
from fake_stages import InlineExecutor
from tiny_recipe import write_recipe

from unpoison.data import load
from unpoison.detectors import Findings
from unpoison.errors import InputError
from unpoison.evaluation import (
    Experiment,
    LocalExecutor,
    Plan,
    Results,
    Store,
    choose_targets,
    leaderboard,
    plan,
    sweep,
)
from unpoison.threats import PoisonSet
from unpoison.training import Trained, predict, train


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Results]:
    folder = tmp_path_factory.mktemp("swept")
    experiment = Experiment.read(write_recipe(folder))
    work = plan(experiment)
    return work, sweep(work, folder / "store", InlineExecutor())


def test_shared_stages_stand_in_the_plan_once(swept: tuple[Plan, Results]) -> None:
    work, _ = swept
    kinds = Counter(stage.kind for stage in work.stages)
    # Of two seeds each: poison; clean model and victim; detector, its random twin, perfect filter.
    assert kinds == {"craft": 2, "train": 4, "find": 6, "heal": 6, "measure": 10}
    keys = [stage.key for stage in work.stages]
    for place, stage in enumerate(work.stages):
        assert set(stage.inputs.values()) <= set(keys[:place])


def test_rows_say_what_the_artefacts_say(swept: tuple[Plan, Results]) -> None:
    work, results = swept
    assert results.failures == ()
    store = Store(results.store)
    stages = {stage.key: stage for stage in work.stages}
    for row in results.table.to_pylist():
        inputs = stages[row["key"]].inputs
        poison = PoisonSet.load(store.place(inputs["poison"]) / "poison")
        victim = Trained.load(store.place(inputs["victim"]) / "model")
        assert row["clean_total"] == 60
        assert row["attack_total"] == 20
        assert sum(row["class_correct"]) == row["clean_correct"]
        assert (victim.training_fingerprint == poison.fingerprint) == (row["control"] == "no attack")
        assert row["poisons"] == (0 if row["control"] == "no attack" else 30)
        if "findings" in inputs:
            findings = Findings.load(store.place(inputs["findings"]) / "findings")
            assert row["flagged"] == len(findings.flagged)
            assert row["true_positives"] == findings.judge(poison).recall.successes
            assert row["false_positives"] == row["flagged"] - row["true_positives"]
            assert sum(row["class_false_positives"]) == row["false_positives"]
            assert sum(row["class_clean"]) == row["clean_examples"] == 270
        else:
            assert row["flagged"] is None
        assert row["seconds_train"] > 0
        assert row["peak_bytes"] > 1e6
        # Inputs are answered as wanted where the margin is negative, on average.
        assert 0 <= row["attack_correct"] <= 20 - row["attack_successes"]
        assert (row["margin"] < 0) == (row["attack_successes"] > 10)


def test_controls_are_what_they_say(swept: tuple[Plan, Results]) -> None:
    _, results = swept
    lines = {line.control: line for line in leaderboard(results)}
    assert set(lines) == {"no attack", "no defense", "", "random filter", "perfect filter"}
    assert lines["perfect filter"].true_positives.rate == 1.0
    assert lines["perfect filter"].false_positives.successes == 0
    for found, drawn in zip(lines[""].rows, lines["random filter"].rows, strict=True):
        assert drawn["flagged"] == found["flagged"]
    assert all(line.n == 2 for line in lines.values())


UNLEARNER = '[[unlearners]]\nname = "retrain"\noptions = { lose_classes = true }\n'


def test_a_repair_is_a_stage_that_begins_with_the_findings(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    text = path.read_text().replace("[0, 1]", "[0]").replace("epochs = 3", "epochs = 8")
    text = text.replace("options = { threshold = 0.0 }", "options = { threshold = 5.0 }")
    text = text[: text.index("[[unlearners]]")] + UNLEARNER + "rounds = 2\n" + UNLEARNER
    path.write_text(text)
    work = plan(Experiment.read(path))
    stages = {stage.key: stage for stage in work.stages}
    healing = Counter(stage.function.partition(":")[2] for stage in work.stages if stage.kind == "heal")
    assert healing == {"repaired": 1, "heal": 3}  # both filters, and the findings once without rounds
    results = sweep(work, tmp_path / "store", InlineExecutor())
    assert results.failures == ()
    rows = {(row["unlearner"], row["control"]): row for row in results.table.to_pylist()}
    once, row = (rows[f"retrain (lose_classes True{rounds})", ""] for rounds in ("", ", rounds 2"))
    assert once["outcome"] is None
    assert once["rounds"] is None
    places = {name: Store(results.store).place(key) for name, key in stages[row["key"]].inputs.items()}
    poison = PoisonSet.load(places["poison"] / "poison")
    record = json.loads((places["healed"] / "repair.json").read_text(encoding="utf-8"))
    findings = Findings.load(places["findings"] / "findings")
    assert record["traces"][0]["flagged"] == len(findings.flagged) == row["flagged"] > 0
    assert row["removed"] == len(record["removed"]) >= row["flagged"]
    assert row["removed_poisons"] == len({*record["removed"]} & {*poison.indices.tolist()})
    assert row["rounds"] == len(record["traces"]) - 1 >= 1
    assert row["outcome"] == record["outcome"] != "nothing found"
    # The model is that of one retraining without all that was removed.
    healed = Trained.load(places["healed"] / "model")
    rest = poison.apply(load(str(tmp_path / "tiny.npz")).train).without(torch.tensor(record["removed"]))
    assert healed.training_fingerprint == rest.fingerprint
    [line] = [one for one in leaderboard(results) if (one.unlearner, one.control) == (row["unlearner"], "")]
    assert (line.removed_recall.successes, line.removed_recall.trials) == (row["removed_poisons"], 30)
    assert line.removed_precision.trials == row["removed"]
    assert line.repaired.successes == (row["outcome"] == "repaired")
    assert line.last_trace_empty.successes == (row["outcome"] != "poison remains")
    assert line.to_dict()["rounds"]["mean"] == row["rounds"]
    others = [one for one in leaderboard(results) if one.unlearner != "none" and one.rows != line.rows]
    assert len(others) == 5
    assert all("rounds" not in one.to_dict() for one in others)


def test_without_an_answer_to_trace_a_repair_changes_nothing(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    text = path.read_text().replace("[0, 1]", "[0]").replace("budget = 0.1", "budget_count = 1")
    text = text[: text.index("[[unlearners]]")].replace("[[detectors]]", "[[detectors]]\ninputs = 21")
    path.write_text(text + UNLEARNER + "rounds = 1\n")
    results = sweep(plan(Experiment.read(path)), tmp_path / "store", InlineExecutor())
    assert results.failures == ()
    [row] = [row for row in results.table.to_pylist() if row["detector"].startswith("ek-fac")]
    assert row["observed"] is False
    assert (row["outcome"], row["rounds"], row["removed"]) == ("nothing found", 0, 0)
    control = next(row for row in results.table.to_pylist() if row["control"] == "no defense")
    assert row["clean_correct"] == control["clean_correct"]


def test_rounds_need_a_detector_that_traces(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    text = path.read_text()
    text = text[: text.index("[[detectors]]")] + '[[detectors]]\nname = "deep-knn"\n'
    path.write_text(text + '[[unlearners]]\nname = "retrain"\nrounds = 2\n')
    with pytest.raises(InputError, match="rounds: deep-knn scans the training set, and there is no"):
        Experiment.read(path)
    path.write_text(write_recipe(tmp_path).read_text() + "rounds = 0\n")
    with pytest.raises(InputError, match=r"rounds: 0 is outside 1\.\.100"):
        Experiment.read(path)


def test_workers_give_the_same_rows(swept: tuple[Plan, Results], tmp_path: Path) -> None:
    work, expected = swept
    with LocalExecutor(2, threads=work.threads) as executor:
        found = sweep(work, tmp_path / "store", executor)
    assert found.deterministic.equals(expected.deterministic)
    assert found.fingerprint == expected.fingerprint


def test_what_changes_a_stage_changes_its_key_and_those_after_it(tmp_path: Path) -> None:
    experiment = Experiment.read(write_recipe(tmp_path))
    before = {stage.key for stage in plan(experiment).stages}
    longer = plan(replace(experiment, training={**experiment.training, "epochs": 4}))
    kept = Counter(stage.kind for stage in longer.stages if stage.key in before)
    assert kept == {"craft": 2, "find": 2}  # the poison and the perfect filter, which need no model
    described = plan(replace(experiment, description="other words", name="other"))
    assert {stage.key for stage in described.stages} == before


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            '["left", "right"]',
            '["left", "rihgt"]',
            "targets.pairs rihgt: no such class; give a name (left, mi",
        ),
        (
            '["left", "right"]',
            '["left", 3]',
            "targets.pairs 3: no such class; give a name (left, middle",
        ),
        ("layers = 1", "layer = 1", "fine-tune: there is no option 'layer'; did you mean 'layers'?"),
        (
            "threshold = 0.0",
            "treshold = 0.0",
            "ek-fac: there is no option 'treshold'; did you mean 'threshold'?",
        ),
        ("layers = 1", "layers = 0", "fine-tune: layers must be"),
        ("tiny.npz", "gone.npz", "gone.npz: no such file"),
        (
            "budget = 0.1",
            'budget = 0.1\ntrigger = "white-cornr"',
            "white-cornr: neither one of white-corner, ",
        ),
        ("budget = 0.1", "budget_count = 500", "count 500 is more than"),
    ],
)
def test_what_does_not_fit_is_said_before_any_work(old: str, new: str, said: str, tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(InputError) as caught:
        plan(Experiment.read(path))
    assert said in str(caught.value)


def test_published_setups_decide_source_and_target(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    setups = [{"target class": 2, "target index": 5, "base class": 0, "base indices": [0, 3]}]
    (tmp_path / "setups.json").write_text(json.dumps(setups))
    path.write_text(path.read_text().replace('pairs = [["left", "right"]]', 'setups = "setups.json"'))
    work = plan(Experiment.read(path))
    trial = work.stages[-1].configuration["trial"]
    assert (trial["source"], trial["target"], trial["test_indices"]) == ("right", "left", [5])


DEFENSES = """
[[defenses]]
name = "random-drop"
options = { sizes = [[1, 40], [2, 20]] }
[[defenses]]
name = "loss-drop"
like = "random-drop"
"""


def test_each_defense_has_a_victim_of_its_own(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    text = path.read_text()
    path.write_text(text[: text.index("[[detectors]]")].replace("[0, 1]", "[0]") + DEFENSES)
    work = plan(Experiment.read(path))
    assert Counter(stage.kind for stage in work.stages) == {"craft": 1, "train": 4, "measure": 4}
    results = sweep(work, tmp_path / "store", InlineExecutor())
    assert results.failures == ()
    lines = {line.defense: line for line in leaderboard(results) if not line.control}
    like = "loss-drop, as many as random-drop"
    drawn = "random-drop (sizes [[1, 40], [2, 20]])"
    assert list(lines) == [drawn, like]
    for label, line in lines.items():
        [row] = line.rows
        assert (row["dropped"], row["examples"]) == (60, 300)
        store, stages = Store(results.store), {stage.key: stage for stage in work.stages}
        trained = Trained.load(store.place(stages[row["key"]].inputs["victim"]) / "model")
        assert [record.examples for record in trained.history] == [300, 260, 240]
        poison = PoisonSet.load(store.place(stages[row["key"]].inputs["poison"]) / "poison")
        poisons = int(poison.membership(300)[trained.dropped].sum())
        assert row["dropped_poisons"] == poisons
        assert (line.drop_precision.successes, line.drop_precision.trials) == (poisons, 60)
        assert (line.drop_recall.successes, line.drop_recall.trials) == (poisons, 30)
        assert line.to_dict()["dropped"]["rate"] == 0.2
        assert label.startswith(trained.defense["name"].partition("(")[0].replace("Drop", "-drop").lower())
    undefended = [line for line in leaderboard(results) if line.control]
    assert [line.control for line in undefended] == ["no attack", "no defense"]
    assert all("dropped" not in line.to_dict() for line in undefended)


def test_attacks_get_the_surrogates_that_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_matching(monkeypatch)
    path = write_recipe(tmp_path)
    text = path.read_text().replace("[0, 1]", "[0]").replace('name = "badnets"', FakeMatching.RECIPE)
    text = text[: text.index("[[detectors]]")].replace('pairs = [["left", "right"]]', "")
    images = '[[targets.images]]\ntest_index = {}\ntarget = "{}"\n'
    path.write_text(text + images.format(3, "right") + images.format(7, "left"))
    work = plan(Experiment.read(path))
    crafting = [stage for stage in work.stages if stage.kind == "craft"]
    assert len(crafting) == 2
    assert crafting[0].inputs == crafting[1].inputs  # the surrogates are shared
    assert sorted(crafting[0].inputs) == ["surrogate 0", "surrogate 1"]
    trained = {stage.key: stage.configuration for stage in work.stages if stage.kind == "train"}
    surrogates = [trained[key] for key in crafting[0].inputs.values()]
    victims = [value for value in trained.values() if value not in surrogates]
    assert [one["recipe"]["epochs"] for one in surrogates] == [2, 2]
    assert len({one["seed"] for one in (*surrogates, *victims)}) == 3
    results = sweep(work, tmp_path / "store", InlineExecutor())
    assert results.failures == ()
    rows = results.table.to_pylist()
    assert [(row["source"], row["target"], row["test_indices"]) for row in rows[::2]] == [
        ("left", "right", [3]),
        ("middle", "left", [7]),
    ]
    assert {row["attack_total"] for row in rows} == {1}
    store = Store(results.store)
    poison = PoisonSet.load(store.place(crafting[0].key) / "poison")
    assert poison.configuration["surrogates"] == 2


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ('test_index = 60\ntarget = "right"', "test image 60 is outside 0..59"),
        ('test_index = 3\ntarget = "right"\nsource = "middle"', "of class 'left', not 'middle'"),
        ('test_index = 3\ntarget = "left"', "test image 3 is of the target class 'left' itself"),
    ],
)
def test_target_images_are_checked(images: str, said: str, tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    text = path.read_text().replace('pairs = [["left", "right"]]', "")
    path.write_text(text + "[[targets.images]]\n" + images)
    with pytest.raises(InputError) as caught:
        plan(Experiment.read(path))
    assert said in str(caught.value)


def test_victims_and_surrogates_start_from_one_pretrained_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_matching(monkeypatch)
    path = write_recipe(tmp_path)
    text = path.read_text().split("[[detectors]]")[0]
    text = text.replace('name = "badnets"', FakeMatching.RECIPE).replace("seeds = [0, 1]", "seeds = [0]")
    text = text.replace('pairs = [["left", "right"]]', 'images = [{ test_index = 0, target = "right" }]')
    text = text.replace('"tiny.npz"', '"tiny.npz"\nrows = [200, 300]\ntest_rows = [0, 30]')
    path.write_text(text + "[pretraining]\nrows = [0, 200]\ntraining = { epochs = 2 }\n")
    work = plan(Experiment.read(path))
    stages = {stage.key: stage for stage in work.stages}
    first = work.stages[0]
    assert first.inputs == {}
    trained = [stage for stage in work.stages if stage.kind == "train"]
    assert len(trained) == 5  # the pretrained one, two surrogates, the clean victim and the poisoned one
    assert all(stage.inputs["start"] == first.key for stage in trained[1:])
    results = sweep(work, tmp_path / "store", InlineExecutor())
    assert results.failures == ()
    store = Store(results.store)
    for row in results.table.to_pylist():
        assert row["clean_total"] == 30
        place = store.place(stages[row["key"]].inputs["victim"])
        victim = Trained.load(place / "model")  # built by its recipe
        start = Trained.load(store.place(first.key) / "model")
        assert (len(start.history), len(victim.history)) == (2, 3)
        # It goes on where the first one stopped: far better than a fresh network in its first epoch.
        assert victim.history[0].loss < start.history[0].loss


def test_retraining_goes_back_to_the_pretrained_network(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    text = path.read_text().replace("seeds = [0, 1]", "seeds = [0]")
    text = text.replace('"tiny.npz"', '"tiny.npz"\nrows = [200, 300]').split("[[detectors]]")[0]
    text += '[[detectors]]\nname = "deep-knn"\n[[unlearners]]\nname = "retrain"\n'
    path.write_text(text + "[pretraining]\nrows = [0, 200]\ntraining = { epochs = 2 }\n")
    work = plan(Experiment.read(path))
    results = sweep(work, tmp_path / "store", InlineExecutor())
    assert results.failures == ()
    stages, store = {stage.key: stage for stage in work.stages}, Store(results.store)
    row = next(row for row in results.table.to_pylist() if row["control"] == "perfect filter")
    places = {name: store.place(key) for name, key in stages[row["key"]].inputs.items()}
    healed = Trained.load(places["healed"] / "model")
    assert not healed.own_model
    first = next(stage for stage in work.stages if stage.kind == "train" and not stage.inputs)
    start = Trained.load(store.place(first.key) / "model").model
    poison = PoisonSet.load(places["poison"] / "poison")
    splits = load(tmp_path / "tiny.npz")
    rest = poison.apply(splits.train.subset(torch.arange(200, 300))).without(poison.indices)
    expected = train(rest, healed.recipe, seed=healed.seed, start=start).model
    for ours, theirs in zip(healed.model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("[pretraining]\nrows = [200, 200]", "rows: give [first, end]"),
        ("[pretraining]\nrows = [0, 301]", "tiny.npz has 300 examples, not 301"),
    ],
)
def test_a_pretraining_that_does_not_fit_is_said(lines: str, said: str, tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    path.write_text(path.read_text().split("[[detectors]]")[0] + lines)
    with pytest.raises(InputError) as caught:
        plan(Experiment.read(path))
    assert said in str(caught.value)


def choosing(tmp_path: Path, count: int) -> Experiment:
    path = write_recipe(tmp_path)
    text = path.read_text()
    text = text[: text.index("[[detectors]]")].replace('"right"]]', f'"right"], [1, 0]]\ncorrect = {count}')
    path.write_text(text)
    return Experiment.read(path)


def test_targets_are_images_that_every_clean_network_predicts_correctly(tmp_path: Path) -> None:
    experiment = choosing(tmp_path, 2)
    with pytest.raises(InputError, match="to be chosen by `choose_targets` first"):
        plan(experiment)
    chosen = choose_targets(experiment, tmp_path / "store", InlineExecutor())
    # A sweep that was finished before stays what it was until the new one begins.
    assert not (tmp_path / "store/recipes").exists()
    assert not (tmp_path / "store/tables").exists()
    assert chosen.targets is not None
    assert [one.source for one in chosen.targets.images] == ["left", "left", 1, 1]
    assert [one.target for one in chosen.targets.images] == ["right", "right", 0, 0]
    work = plan(chosen)
    results = sweep(work, tmp_path / "store", InlineExecutor())
    assert results.failures == ()
    test = load(str(tmp_path / "tiny.npz")).test
    assert test is not None
    clean = [
        Trained.load(Store(results.store).place(stage.key) / "model").model
        for stage in work.stages
        if stage.kind == "train" and not stage.inputs
    ]
    assert len(clean) == 2
    right = torch.stack([predict(model, test.images).argmax(1) == test.labels for model in clean]).all(0)
    for label, images in ((0, chosen.targets.images[:2]), (1, chosen.targets.images[2:])):
        expected = (right & (test.labels == label)).nonzero().squeeze(1)[:2].tolist()
        assert [one.test_index for one in images] == [(place,) for place in expected]
    # The clean networks are the controls of the trials, so they are not trained again.
    again = choose_targets(experiment, tmp_path / "store", InlineExecutor())
    assert again == chosen
    assert choose_targets(chosen, tmp_path / "store", InlineExecutor()) is chosen


def test_too_few_correct_predictions_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="of class 'left' correctly, fewer than 21"):
        choose_targets(choosing(tmp_path, 21), tmp_path / "store", InlineExecutor())


def test_label_flips_are_measured_on_the_source_class(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    text = path.read_text().replace("[0, 1]", "[0]").replace('name = "badnets"', 'name = "label-flip"')
    path.write_text(text[: text.index("[[detectors]]")])
    results = sweep(plan(Experiment.read(path)), tmp_path / "store", InlineExecutor())
    assert results.failures == ()
    assert {row["attack_total"] for row in results.table.to_pylist()} == {20}


def test_detectors_that_scan_need_no_wrong_answer(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    text = path.read_text().replace("[0, 1]", "[0]").replace("epochs = 3", "epochs = 1")
    text = text.replace('name = "ek-fac"\noptions = { threshold = 0.0 }', 'name = "spectral-signatures"')
    path.write_text(text[: text.index("[[unlearners]]")])
    results = sweep(plan(Experiment.read(path)), tmp_path / "store", InlineExecutor())
    assert results.failures == ()
    [row] = [row for row in results.table.to_pylist() if row["detector"].startswith("spectral")]
    assert row["flagged"] > 0
    assert row["observed"] is None
