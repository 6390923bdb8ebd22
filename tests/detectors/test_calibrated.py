"""Calibrated Delta-Influence: its decision, its calibration, its selection, and a real backdoor."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unpoison.data import TrainingSet
from unpoison.detectors import Calibrated, Calibration, Findings, Observation
from unpoison.detectors import _collapse as collapse
from unpoison.detectors._calibration import Rank, choose
from unpoison.detectors._collapse import LabelCollapse
from unpoison.detectors._conformal import statistic
from unpoison.detectors._decision import select
from unpoison.detectors._seed_expansion import SplitScores
from unpoison.errors import InputError, MismatchError
from unpoison.influence import _factors, fit_factors
from unpoison.tasks import ClassificationTask
from unpoison.training import predict


def make(**settings: Any) -> Calibrated:
    return Calibrated(**{"false_alarm_level": 0.05, **settings})


@pytest.fixture(scope="module")
def calibration(scene: Any) -> Calibration:
    return make().calibrate(scene.model, scene.poisoned, scene.held_out, factors=scene.factors)


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_calibrated_finds_the_poison(make_scenes: Callable[[int], Any], seed: int) -> None:
    scene = make_scenes(seed)
    for reference in (None, scene.held_out):
        found: Findings = make().find(
            scene.model, scene.poisoned, scene.observation, reference=reference, factors=scene.factors
        )
        judgement = found.judge(scene.poison)
        assert found.poison_found
        assert found.p_value is not None
        assert found.p_value <= 0.05
        assert judgement.precision.rate >= 0.9
        assert judgement.recall.rate >= 0.9
        assert judgement.average_precision >= 0.95
        assert found.summary.startswith(f"Poison found: {len(found.flagged)} of 600")
        assert found.cause is not None
        assert found.cause.kind == "trigger-like"
        assert found.cause.examples == len(found.flagged)
        assert ("held-out" in found.threshold.how) == (reference is not None)
        # One unit: flagged is what lies above the threshold.
        assert torch.equal(found.mask(), found.scores > found.threshold.value)
        others = found.labels != scene.observation.predicted
        assert float(found.scores[others].max()) < float(found.scores[~others].min())


def test_the_pattern_that_flagged_inputs_share_decides_on_the_flags(
    scene: Any, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = make().find(scene.model, scene.poisoned, scene.observation, calibration=calibration)
    rows = (scene.poisoned.labels == scene.observation.predicted).nonzero()[:, 0]
    odds = found.evidence["pattern_log_odds"]
    assert "pattern" in found.threshold.how
    assert torch.equal(found.mask(), odds > 0)
    assert torch.equal(odds[rows].argsort(), found.scores[rows].argsort())
    assert not odds[found.labels != scene.observation.predicted].any()
    monkeypatch.setattr("unpoison.detectors._decision.shared_pattern", lambda *_: None)
    without = make().find(scene.model, scene.poisoned, scene.observation, calibration=calibration)
    assert "pattern_log_odds" not in without.evidence
    assert "similar gradients" in without.threshold.how
    assert torch.equal(without.evidence["seed_similarity"], found.evidence["seed_similarity"])
    assert without.p_value == found.p_value


def test_natural_errors_are_found_exactly_as_often_as_the_level_says(natural: Any) -> None:
    model, training_set, fresh = natural
    factors = fit_factors(model, training_set, ClassificationTask(), seed=1)
    half = len(fresh) // 2
    detector = make(false_alarm_level=0.1)
    calibration = detector.calibrate(model, training_set, fresh.subset(range(half)), factors=factors)
    answers = predict(model, fresh.images).argmax(1)
    wrong = half + (answers != fresh.labels)[half:].nonzero()[:40, 0]
    assert len(wrong) == 40
    p_values = []
    for row in wrong:
        observation = Observation(fresh.images[row], int(answers[row]), int(fresh.labels[row]))
        found = detector.find(model, training_set, observation, calibration=calibration)
        assert found.p_value is not None
        p_values.append(found.p_value)
        assert found.poison_found == (found.p_value <= 0.1)
        assert found.cause is not None
        if not found.poison_found:
            assert not len(found.flagged)
            assert found.threshold.value == math.inf
            assert found.summary.startswith("No poison found")
            assert found.cause.kind in ("near-duplicates", "label noise", "hard region")
    # Of 40 at a level of .1, ten or more less than once in 300 tries.
    assert sum(value <= 0.1 for value in p_values) <= 9
    # Uniform as far as anything stands out, and 1 where nothing does.
    some = float((calibration.statistics > 0).double().mean()) / 2
    assert some > 0.1
    assert sum(value <= some for value in p_values) / 40 == pytest.approx(some, abs=0.17)


def test_where_nothing_is_found_stage_four_orders_the_examples(
    scene: Any, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = scene.held_out.images[scene.held_out.labels == 1][:1]
    asked = Observation(image, int(predict(scene.model, image).argmax(1)))
    rows = (scene.poisoned.labels == asked.predicted).nonzero()[:, 0]
    monkeypatch.setattr("unpoison.detectors._decision.artifact_mixture", lambda *_, **__: None)
    plain = make().find(scene.model, scene.poisoned, asked, calibration=calibration)
    odds = torch.linspace(-5, 3, len(rows), dtype=torch.float64)
    monkeypatch.setattr("unpoison.detectors._seed_expansion._SEPARATED", math.inf)
    monkeypatch.setattr("unpoison.detectors._decision._NO_MEMBERS", -1.0)
    monkeypatch.setattr("unpoison.detectors._decision.artifact_mixture", lambda *_, **__: odds)
    found = make().find(scene.model, scene.poisoned, asked, calibration=calibration)
    assert not plain.poison_found
    similar = plain.evidence["seed_similarity"][rows]
    assert torch.equal(plain.scores[rows].argsort(), similar.argsort())
    assert (found.poison_found, found.p_value, found.threshold) == (False, plain.p_value, plain.threshold)
    assert not len(found.flagged)
    assert found.ranking()[: len(rows)].tolist() == rows.flip(0).tolist()
    assert torch.equal(found.evidence["artifact_log_odds"][rows], odds)
    assert torch.equal(found.evidence["excess"], plain.evidence["excess"])


def test_artifacts_are_measured_once_for_all_answers_with_a_label(
    scene: Any, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh, asked = replace(calibration), []

    def measured(model: Any, examples: TrainingSet, *_: Any) -> Tensor:
        asked.append(int(examples.labels[0]))
        return torch.zeros(len(examples), 3, dtype=torch.float64)

    monkeypatch.setattr("unpoison.detectors._seed_expansion._SEPARATED", math.inf)
    monkeypatch.setattr("unpoison.detectors._decision.artifact_features", measured)
    for _ in range(2):
        make().find(scene.model, scene.poisoned, scene.observation, calibration=fresh)
    assert asked == [scene.observation.predicted]


def test_a_calibration_is_kept_and_reused(scene: Any, calibration: Calibration, tmp_path: Path) -> None:
    anew = make().find(
        scene.model, scene.poisoned, scene.observation, reference=scene.held_out, factors=scene.factors
    )
    calibration.save(tmp_path / "kept")
    kept = Calibration.load(tmp_path / "kept")
    stages: set[str] = set()
    found = make().find(
        scene.model,
        scene.poisoned,
        scene.observation,
        calibration=kept,
        progress=lambda stage, done, total, **_: stages.add(stage),
    )
    assert not stages & {"covariance", "eigenvalues", "calibration"}
    assert found.p_value == anew.p_value
    assert torch.equal(found.scores, anew.scores)
    assert torch.equal(found.flagged, anew.flagged)
    assert found.threshold == anew.threshold


def test_a_calibration_is_taken_only_where_an_equal_one_would_be_made(scene: Any, tmp_path: Path) -> None:
    place, detector, groups = tmp_path / "kept", make(), [row // 2 for row in range(600)]
    given = (scene.model, scene.poisoned, scene.held_out)
    assert detector.kept(place, *given, groups=groups) is None
    made = detector.calibrate(*given, groups=groups, factors=scene.factors)
    made.save(place)
    found = detector.kept(place, *given, groups=groups)
    assert found is not None
    assert torch.equal(found.statistics, made.statistics)
    # Other names of the same groups, and another level that it is large enough for.
    named = [f"group {group}" for group in groups]
    assert make(false_alarm_level=0.1).kept(place, *given, groups=named) is not None
    assert make(false_alarm_level=1e-4).kept(place, *given, groups=groups) is None
    other = copy.deepcopy(scene.model)
    with torch.no_grad():
        other[0].weight[0, 0, 0, 0] += 1e-3
    changed: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((other, scene.poisoned, scene.held_out), {"groups": groups}),
        ((scene.model, scene.clean, scene.held_out), {"groups": groups}),
        ((scene.model, scene.poisoned, scene.held_out.subset(range(100))), {"groups": groups}),
        ((scene.model, scene.poisoned), {"groups": groups}),
        (given, {}),
        (given, {"groups": groups, "seed": 1}),
    ]
    assert all(detector.kept(place, *those, **options) is None for those, options in changed)
    damped = make(damping=replace(detector.damping, share=0.2))
    assert damped.kept(place, *given, groups=groups) is None
    (place / "calibration.safetensors").write_bytes(b"")
    assert detector.kept(place, *given, groups=groups) is None


def test_a_calibration_of_something_else_is_refused(scene: Any, calibration: Calibration) -> None:
    other = copy.deepcopy(scene.model)
    with torch.no_grad():
        other[0].weight[0, 0, 0, 0] += 1e-3
    with pytest.raises(MismatchError, match="another model"):
        make().find(other, scene.poisoned, scene.observation, calibration=calibration)
    with pytest.raises(MismatchError, match="other examples"):
        make().find(scene.model, scene.clean, scene.observation, calibration=calibration)
    damped = make(damping=replace(make().damping, share=0.2))
    with pytest.raises(MismatchError, match=r"damping RelativeDamping\(share=0\.1\), not .*0\.2"):
        damped.find(scene.model, scene.poisoned, scene.observation, calibration=calibration)
    strict = make(false_alarm_level=1e-4)
    with pytest.raises(InputError, match=rf"takes 9999 calibration errors, .* has {len(calibration)}; raise"):
        strict.find(scene.model, scene.poisoned, scene.observation, calibration=calibration)


def test_a_damaged_calibration_is_an_error(calibration: Calibration, tmp_path: Path) -> None:
    calibration.save(tmp_path / "kept")
    record = tmp_path / "kept" / "calibration.json"
    values = json.loads(record.read_text())
    for change in ({"format": 99}, {"errors": None, "held_out": None, "images": None, "damping": None}):
        record.write_text(json.dumps({**values, **change}))
        if "format" in change:
            with pytest.raises(InputError, match="format 99"):
                Calibration.load(tmp_path / "kept")
    record.write_text(json.dumps({"format": values["format"]}))
    with pytest.raises(InputError, match="damaged calibration"):
        Calibration.load(tmp_path / "kept")


def test_near_errors_count_beyond_all_errors_alone(scene: Any, calibration: Calibration) -> None:
    rows = (scene.poisoned.labels == 0).nonzero()[:, 0]
    excess = torch.zeros(len(rows), dtype=torch.float64)
    excess[:5] = 6.0
    value = float(statistic(excess, calibration.near.multiplicities[rows]))
    count = len(calibration)

    def p(errors: int, above: set[int]) -> float:
        statistics = torch.full((count,), value - 1, dtype=torch.float64)
        statistics[sorted(above)] = value + 1
        changed = replace(calibration, errors=errors, statistics=statistics)
        return changed.p_value(value, excess, rows, 0, torch.zeros(1, 2)).p_value

    assert p(count, {0, 1}) == 3 / (count + 1)
    assert p(10, set()) == 1 / (count + 1)
    assert p(10, {20}) == 2 / (count + 1)
    assert p(10, {0}) == 2 / 11
    assert p(10, {0, 20}) == 2 / 11
    assert p(0, {0}) == 2 / (count + 1)


class Carried:
    """In place of `Patterns`: which of the answers carry one, by the first number of an input."""

    def __init__(self, *answers: int) -> None:
        self.answers, self.asked = answers, list[int]()

    def carried(self, label: int, inputs: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> bool:
        self.asked.append(int(inputs[0, 0]))
        return self.asked[-1] in self.answers


def test_an_input_with_a_pattern_ranks_above_those_without(scene: Any, calibration: Calibration) -> None:
    rows, count = (scene.poisoned.labels == 0).nonzero()[:, 0], len(calibration)
    excess = torch.zeros(len(rows), dtype=torch.float64)
    excess[:5] = 6.0
    value = float(statistic(excess, calibration.near.multiplicities[rows]))
    statistics = torch.full((count,), value - 1, dtype=torch.float64)
    statistics[:30] = value + 1
    numbered = torch.arange(count)[:, None].float()
    suspect = torch.full((1, 1), 1000.0)

    def rank(patterns: Carried, level: float, own: float = value) -> Rank:
        known = replace(calibration, errors=count, statistics=statistics, inputs=numbered)
        given: Any = patterns
        return known.p_value(own, excess, rows, 0, suspect, patterns=given, level=level)

    assert rank(Carried(), 0.01) == Rank(31 / (count + 1))
    assert rank(Carried(1000), 0.01) == Rank(1 / (count + 1), carried=True)
    # Of errors with one, those whose statistic is as large, and no others, are as extreme.
    among = Carried(1000, 3, 4, 40)
    assert rank(among, 0.01) == Rank(3 / (count + 1), carried=True)
    assert set(among.asked) == {1000, *range(30)}
    # Without one those that have one are more extreme; asked about where it makes a difference.
    unasked = Carried(3, 40)
    assert rank(unasked, 0.01) == Rank(31 / (count + 1))
    assert unasked.asked == [1000]
    assert rank(Carried(3, 40), 1.0) == Rank(32 / (count + 1))
    assert rank(Carried(3, 40), 0.5, value + 2) == Rank(3 / (count + 1))


def test_groups_that_are_known_count_once(scene: Any) -> None:
    apart = list(range(600))
    together = [0 if int(label) == 0 else row for row, label in enumerate(scene.poisoned.labels)]
    found = {}
    for name, groups in (("apart", apart), ("together", together)):
        calibration = make().calibrate(
            scene.model, scene.poisoned, scene.held_out, groups=groups, factors=scene.factors
        )
        found[name] = make().find(scene.model, scene.poisoned, scene.observation, calibration=calibration)
    assert found["apart"].poison_found
    assert found["together"].p_value > found["apart"].p_value
    assert not found["together"].poison_found
    assert found["together"].cause.kind == "near-duplicates"
    with pytest.raises(InputError, match="one for each of the 600"):
        make().calibrate(scene.model, scene.poisoned, scene.held_out, groups=[1, 2])


def test_an_observation_is_no_calibration_error_of_its_own(natural: Any) -> None:
    model, training_set, fresh = natural
    factors = fit_factors(model, training_set, ClassificationTask(), seed=1)
    calibration = make().calibrate(model, training_set, fresh, factors=factors)
    assert calibration.errors == len(calibration)
    answers = predict(model, fresh.images).argmax(1)
    wrong = (answers != fresh.labels).nonzero()[:, 0]
    p_values = []
    for row in wrong[:5]:
        found = make().find(
            model, training_set, Observation(fresh.images[row], int(answers[row])), calibration=calibration
        )
        p_values.append(found.p_value)
    assert any(
        value * len(calibration) == pytest.approx(round(value * len(calibration))) for value in p_values
    )


def test_several_inputs_are_one_query(scene: Any, calibration: Calibration) -> None:
    one = make().find(scene.model, scene.poisoned, scene.observation, calibration=calibration)
    three = make().find(scene.model, scene.poisoned, scene.observations, calibration=calibration)
    assert three.poison_found
    assert three.judge(scene.poison).recall.rate >= one.judge(scene.poison).recall.rate - 0.05


def test_the_batch_size_does_not_matter(scene: Any) -> None:
    one, other = (
        make(batch_size=size).find(scene.model, scene.poisoned, scene.observation, reference=scene.held_out)
        for size in (64, 600)
    )
    after, expected = (found.evidence["influence_after"].nan_to_num() for found in (one, other))
    assert torch.allclose(after, expected, atol=1e-4 * float(expected.abs().max()))
    assert (one.poison_found, one.p_value) == (other.poison_found, other.p_value)
    assert len(set(one.flagged.tolist()) ^ set(other.flagged.tolist())) <= 2


def test_queries_in_parts_give_the_same(
    scene: Any, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collapse, "_QUERY_BYTES", 1)
    parts = make().calibrate(scene.model, scene.poisoned, scene.held_out, factors=scene.factors)
    assert torch.allclose(parts.statistics, calibration.statistics, rtol=1e-3, atol=1e-3)
    assert torch.allclose(parts.centre, calibration.centre, atol=1e-3)


def test_the_model_is_fingerprinted_once(scene: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read, content = [], _factors._content
    monkeypatch.setattr(_factors, "_content", lambda tensor: read.append(1) or content(tensor))
    kept = make().calibrate(scene.model, scene.poisoned, scene.held_out, factors=scene.factors)
    tensors = len(scene.model.state_dict())
    assert len(read) == tensors
    make().find(scene.model, scene.poisoned, scene.observation, calibration=kept)
    assert len(read) == 2 * tensors


def test_the_collapse_is_the_mean_over_the_other_labels(scene: Any) -> None:
    inputs = scene.held_out.batch(0, 5)[0]
    own = torch.tensor([0, 1, 2, 3, 1])
    task = ClassificationTask()
    with torch.no_grad():
        found = LabelCollapse().measurement(scene.model, (inputs, own))
        every = torch.stack(
            [task.measurement(scene.model, (inputs, torch.full((5,), label))) for label in range(4)], 1
        )
    for place, label in enumerate(own.tolist()):
        others = [float(every[place, other]) for other in range(4) if other != label]
        assert float(found[place]) == pytest.approx(float(every[place, label]) - sum(others) / 3, rel=1e-5)


def test_too_few_labelled_examples_are_an_error_that_says_which_level_fits(scene: Any) -> None:
    few = scene.held_out.subset(range(30))
    with pytest.raises(InputError, match=r"takes 99 labelled examples, there are 30; raise") as error:
        Calibrated().find(scene.model, scene.poisoned, scene.observation, reference=few)
    level = float(str(error.value).split("raise the level to ")[1].split()[0])
    found = make(false_alarm_level=level).find(
        scene.model, scene.poisoned, scene.observation, reference=few, factors=scene.factors
    )
    assert found.threshold.false_alarm_level == level
    assert "near-errors" in found.threshold.how


def test_a_reference_must_be_of_the_same_kind(scene: Any) -> None:
    grown = TrainingSet(
        torch.zeros(2, 1, 9, 9, dtype=torch.uint8), torch.tensor([0, 1]), ("a", "b", "c", "d")
    )
    for reference in (grown, replace(scene.clean, class_names=("a", "b", "c", "d", "e"))):
        with pytest.raises(InputError, match=r"a reference needs inputs of shape \(1, 8, 8\) in 4 classes"):
            make().find(scene.model, scene.poisoned, scene.observation, reference=reference)


def test_errors_come_first_and_near_errors_fill_up() -> None:
    randomness = torch.Generator().manual_seed(0)
    logits = torch.randn(60, 3, generator=randomness)
    labels = logits.argmax(1)
    labels[:10] = logits[:10].argsort(1)[:, 1]  # ten errors
    source = TrainingSet(torch.zeros(60, 1, 2, 2, dtype=torch.uint8), labels, ("a", "b", "c"))
    inputs = choose(source, logits, held_out=True, level=0.05, seed=0)
    assert inputs.errors == 10
    assert sorted(inputs.rows[:10].tolist()) == list(range(10))
    assert torch.equal(inputs.answers[:10], logits[inputs.rows[:10]].argmax(1))
    assert len(inputs.rows) == 21  # a tenth more than 19
    two = logits[10:].topk(2, 1).values
    nearest = 10 + (two[:, 0] - two[:, 1]).argsort()[:11]
    assert inputs.rows[10:].tolist() == nearest.tolist()
    assert torch.equal(inputs.answers[10:], logits[nearest].topk(2, 1).indices[:, 1])
    for label, rows in enumerate(inputs.baseline):
        own = labels[rows] == label
        assert int(own.sum()) == min(8, int((labels[10:] == label).sum()))
        assert int((~own).sum()) == 8
        assert bool((rows >= 10).all())
    # The training set's own correct answers may be poison, so of those none is a baseline input.
    for label, rows in enumerate(choose(source, logits, held_out=False, level=0.05, seed=0).baseline):
        assert not bool((labels[rows] == label).any())
    again = choose(source, logits, held_out=True, level=0.05, seed=0)
    assert torch.equal(again.rows, inputs.rows)


def test_of_more_logits_than_classes_only_the_classes_are_asked_about() -> None:
    randomness = torch.Generator().manual_seed(0)
    logits = torch.randn(60, 6, generator=randomness)
    answers = logits.argmax(1)
    labels = answers % 3
    labels[:10] = (answers[:10] + 1) % 3
    source = TrainingSet(torch.zeros(60, 1, 2, 2, dtype=torch.uint8), labels, ("a", "b", "c"))
    inputs = choose(source, logits, held_out=True, level=0.05, seed=0)
    assert 0 < inputs.errors == int((answers[:10] < 3).sum()) < int((answers != labels).sum())
    assert int(inputs.answers.max()) < 3
    near = inputs.rows[inputs.errors :]
    assert len(near) == 21 - inputs.errors
    assert torch.equal(inputs.answers[inputs.errors :], logits[near, :3].topk(2, 1).indices[:, 1])


@pytest.mark.parametrize(("level", "errors"), [(0.01, 99), (0.05, 19), (0.1, 9), (0.5, 1), (0.3, 3)])
def test_the_level_decides_the_number_of_calibration_errors(level: float, errors: int) -> None:
    assert Calibrated(false_alarm_level=level).calibration_errors == errors
    assert 1 / (errors + 1) <= level + 1e-9 < 1 / errors + 1e-9


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, math.nan])
def test_levels_outside_0_and_1_are_refused(value: float) -> None:
    with pytest.raises(InputError, match=r"calibrated: false_alarm_level must be a number in \(0, 1\)"):
        Calibrated(false_alarm_level=value)


def test_an_answer_whose_truth_is_not_given_is_said_to_be_that(scene: Any, calibration: Calibration) -> None:
    images = torch.cat([scene.observation.images, scene.held_out.images[:1]])
    answers = predict(scene.model, images).argmax(1)
    for image, answer in zip(images, answers.tolist(), strict=True):
        unknown = Observation(image, answer)
        found = make().find(scene.model, scene.poisoned, unknown, calibration=calibration)
        assert "true label is not given" in found.summary
    known = make().find(scene.model, scene.poisoned, scene.observation, calibration=calibration)
    assert "true label" not in known.summary
    right = Observation(scene.held_out.images[0], None, int(answers[1]))
    with pytest.raises(InputError, match="is right; there is nothing to trace"):
        make().find(scene.model, scene.poisoned, right, calibration=calibration)


def test_a_label_that_is_not_the_answer_is_compared_with_inputs_that_do_not_get_it_either(
    natural: Any, scene: Any, calibration: Calibration
) -> None:
    model, training_set, fresh = natural
    half, label = len(fresh) // 2, 2
    reference, detector = fresh.subset(range(half)), make(false_alarm_level=0.1)
    kept = detector.calibrate(model, training_set, reference)
    answers = predict(model, fresh.images).argmax(1)
    rows = half + ((answers != label) & (fresh.labels != label))[half:].nonzero()[:40, 0]
    p_values = []
    for row in rows:
        found = detector.find(
            model,
            training_set,
            Observation(fresh.images[row], label, answered=False),
            reference=reference,
            calibration=kept,
        )
        assert found.p_value is not None
        assert "inputs with other answers, asked about the same label" in found.threshold.how
        p_values.append(found.p_value)
    assert sum(value <= 0.1 for value in p_values) <= 9
    assert sum(p_values) / 40 == pytest.approx(0.5, abs=0.17)
    # A label that is the answer after all is compared with errors, as ever.
    one, other = (
        make().find(scene.model, scene.poisoned, observation, calibration=calibration)
        for observation in (scene.observation, replace(scene.observation, answered=False))
    )
    assert (one.p_value, one.threshold) == (other.p_value, other.threshold)


def test_what_the_level_is_worth_for_a_label_that_is_not_the_answer_is_said(
    scene: Any, calibration: Calibration
) -> None:
    image = scene.held_out.images[scene.held_out.labels == 1][0]
    asked = Observation(image, 2, answered=False)
    found = make().find(scene.model, scene.poisoned, asked, calibration=calibration)
    assert "of the training set, which the level hardly fits" in found.threshold.how
    given = {"calibration": calibration, "reference": scene.held_out.subset(range(20))}
    few = make().find(scene.model, scene.poisoned, asked, **given)
    assert "the level takes 19, so nothing can be found" in few.threshold.how
    assert not few.poison_found
    assert "training set" not in few.threshold.how


def test_a_summary_says_when_much_of_the_network_is_not_tracked(scene: Any, calibration: Calibration) -> None:
    whole = make().find(scene.model, scene.poisoned, scene.observation, calibration=calibration)
    assert "parameters" not in whole.summary
    part = make(modules=("5",)).find(scene.model, scene.poisoned, scene.observation, reference=scene.held_out)
    assert part.tracked_share is not None
    assert part.tracked_share < 0.9
    assert "of the model's parameters, without 0.weight, 0.bias, 2.weight and 1 more" in part.summary


def test_an_answer_without_training_examples_goes_back_to_none(scene: Any) -> None:
    rows = (scene.clean.labels != 0).nonzero()[:, 0]
    without = scene.clean.subset(rows)
    found = make().find(scene.model, without, scene.observation, reference=scene.held_out)
    assert not found.poison_found
    assert found.p_value == 1


FEW, MANY = {0, 1, 2}, set(range(8))
EXCESS = torch.linspace(0, 9, 100, dtype=torch.float64)
SEEDS = torch.tensor([99, 98, 97])


def expansion(members: set[int], *, height: float) -> SplitScores:
    """100 examples, with members at such a height above the others."""
    scores = torch.linspace(-0.5, 0.5, 100, dtype=torch.float64)
    scores[sorted(members)] = height
    return SplitScores(scores, 0.55)


def log_odds(found: set[int]) -> Tensor:
    values = torch.full((100,), -3.0, dtype=torch.float64)
    values[sorted(found)] = 2.0
    return values


@pytest.mark.parametrize(
    ("members", "artifacts", "expected"),
    [
        pytest.param(FEW, MANY, MANY, id="many have the artifacts and no similar gradients"),
        pytest.param(set(), MANY, MANY, id="none has similar gradients"),
        pytest.param(MANY, MANY | {8}, MANY, id="one more has the artifacts"),
        pytest.param(MANY, FEW, MANY, id="fewer have the artifacts"),
        pytest.param(MANY, None, MANY, id="no artifacts"),
        pytest.param(set(), None, {97, 98, 99}, id="neither: the seeds"),
    ],
)
def test_the_artifact_mixture_decides_where_it_finds_many_that_are_no_members(
    members: set[int], artifacts: set[int] | None, expected: set[int]
) -> None:
    similar = expansion(members, height=0.9)
    odds = None if artifacts is None else log_odds(artifacts)
    found = select(similar, odds, EXCESS, SEEDS)
    assert set(found.flagged.nonzero()[:, 0].tolist()) == expected
    assert torch.equal(found.scores > found.threshold, found.flagged)
    by_artifacts = artifacts == MANY and members != MANY
    assert found.kind == ("optimised images" if by_artifacts else "trigger-like")
    assert ("artifacts" in found.rule) == by_artifacts
