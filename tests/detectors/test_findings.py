"""Findings: on disk and back, held against the truth, and damaged."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from unpoison.data import TrainingSet
from unpoison.detectors import Draw, Findings, Observation, Threshold, average_precision
from unpoison.errors import InputError, MismatchError
from unpoison.threats import Backdoor, PatchTrigger, PoisonSet


def make_findings(scores: list[float] | None = None, flagged: list[int] | None = None) -> Findings:
    values = torch.tensor([0.5, 3.0, -1.0, 3.0, 2.0] if scores is None else scores, dtype=torch.float64)
    return Findings(
        method="delta-influence",
        configuration={"draws": 2, "damping": {"name": "AbsoluteDamping"}, "modules": None},
        fingerprint="abc",
        labels=torch.arange(len(values)) % 2,
        class_names=("cat", "<dog>"),
        scores=values,
        flagged=torch.tensor([1, 3] if flagged is None else flagged, dtype=torch.int64),
        threshold=Threshold(2.5, "by hand", 0.01),
        poison_found=True,
        p_value=0.005,
        summary="Poison found: 2 of 5",
        evidence={"influence_before": values * 2, "collapses": values.abs().floor()},
        observation=Observation(torch.full((2, 1, 2, 3), 7, dtype=torch.uint8), 1, 0, indices=(4, 9)),
        draws=(Draw("flip", 0), Draw("colour jitter", 0)),
        draw_images=torch.arange(12, dtype=torch.uint8).view(2, 1, 2, 3),
        seconds={"factors": 1.5},
        peak_bytes=12345,
    )


def assert_same(one: Findings, other: Findings) -> None:
    for name in ("labels", "scores", "flagged"):
        assert torch.equal(getattr(one, name).double(), getattr(other, name).double()), name
    for name in (
        "method",
        "configuration",
        "fingerprint",
        "class_names",
        "threshold",
        "poison_found",
        "p_value",
        "summary",
        "draws",
        "seconds",
        "peak_bytes",
    ):
        assert getattr(one, name) == getattr(other, name), name
    assert one.evidence.keys() == other.evidence.keys()
    for name in one.evidence:
        assert torch.equal(one.evidence[name].double(), other.evidence[name].double())
    if one.observation is None or other.observation is None:
        assert one.observation is other.observation
    else:
        assert torch.equal(one.observation.images, other.observation.images)
        assert one.observation.predicted == other.observation.predicted
        assert one.observation.true_label == other.observation.true_label
        assert one.observation.indices == other.observation.indices
    if one.draw_images is None or other.draw_images is None:
        assert one.draw_images is other.draw_images
    else:
        assert torch.equal(one.draw_images, other.draw_images)


def poison_at(indices: list[int], count: int) -> PoisonSet:
    images = torch.zeros(count, 1, 4, 4, dtype=torch.uint8)
    clean = TrainingSet(images, torch.ones(count, dtype=torch.int64), ("a", "b"))
    trigger = PatchTrigger.white_corner(1)
    return PoisonSet.of(
        clean,
        indices=indices,
        images=trigger.stamp(images[: len(indices)]),
        given_labels=torch.zeros(len(indices), dtype=torch.int64),
        goal=Backdoor(trigger, source=1, target=0),
        attack="by hand",
        configuration={},
        seed=0,
    )


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    findings = make_findings()
    findings.save(tmp_path / "findings")
    assert_same(Findings.load(tmp_path / "findings"), findings)
    assert sorted(path.name for path in (tmp_path / "findings").iterdir()) == [
        "examples.parquet",
        "findings.json",
        "tensors.safetensors",
    ]
    # Once more to the same place: replaced as a whole.
    other = make_findings([1.0, 2.0], [1])
    other.save(tmp_path / "findings")
    assert_same(Findings.load(tmp_path / "findings"), other)
    assert [path.name for path in tmp_path.iterdir()] == ["findings"]


def test_findings_without_observation_draws_or_flags(tmp_path: Path) -> None:
    bare = replace(
        make_findings(flagged=[]),
        observation=None,
        draws=(),
        draw_images=None,
        evidence={},
        p_value=None,
        poison_found=False,
        threshold=Threshold(float("inf"), "nothing is blamed"),
    )
    bare.save(tmp_path / "findings")
    loaded = Findings.load(tmp_path / "findings")
    assert_same(loaded, bare)
    assert loaded.threshold.value == math.inf
    assert not loaded.mask().any()


@settings(max_examples=25, deadline=None)
@given(
    scores=st.lists(st.floats(allow_nan=False, width=32), min_size=1, max_size=12),
    summary=st.text(max_size=30).filter(lambda text: text.isprintable()),
    value=st.floats(allow_nan=False, allow_infinity=False),
    data=st.data(),
)
def test_whatever_is_found_comes_back(
    scores: list[float], summary: str, value: float, data: st.DataObject
) -> None:
    flagged = data.draw(st.lists(st.integers(0, len(scores) - 1), unique=True))
    findings = replace(make_findings(scores, flagged), summary=summary, threshold=Threshold(value, "drawn"))
    with tempfile.TemporaryDirectory() as folder:
        findings.save(Path(folder) / "findings")
        assert_same(Findings.load(Path(folder) / "findings"), findings)


def edit(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        record = json.loads((folder / "findings.json").read_text())
        change(record)
        (folder / "findings.json").write_text(json.dumps(record))

    return damage


def cut(name: str, share: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return damage


def drop_column(folder: Path) -> None:
    table = pq.read_table(folder / "examples.parquet")
    pq.write_table(table.drop_columns(["score"]), folder / "examples.parquet")


def flag_outside(folder: Path) -> None:
    save_file({"flagged": torch.tensor([1, 99])}, folder / "tensors.safetensors")


DAMAGES: dict[str, Callable[[Path], None]] = {
    **{
        f"no {name}": lambda folder, name=name: (folder / name).unlink()  # type: ignore[misc]
        for name in ("findings.json", "examples.parquet", "tensors.safetensors")
    },
    **{
        f"{name} cut at {share}": cut(name, share)
        for name in ("findings.json", "examples.parquet", "tensors.safetensors")
        for share in (0, 0.1, 0.5, 0.95)
    },
    "another format": edit(lambda record: record.update(format=99)),
    "no method": edit(lambda record: record.pop("method")),
    "no threshold": edit(lambda record: record.update(threshold=None)),
    "an unknown setting": edit(lambda record: record["threshold"].update(colour="red")),  # type: ignore[attr-defined]
    "draws are a number": edit(lambda record: record.update(draws=3)),
    "a bad observation": edit(lambda record: record.update(observation={"predicted": 1, "true_label": 1})),
    "a list": lambda folder: (folder / "findings.json").write_text("[]") and None,
    "no scores": drop_column,
    "flags outside": flag_outside,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_findings_are_one_line_that_names_them(damage: str, tmp_path: Path) -> None:
    make_findings().save(tmp_path / "findings")
    DAMAGES[damage](tmp_path / "findings")
    with pytest.raises(InputError) as error:
        Findings.load(tmp_path / "findings")
    assert "\n" not in str(error.value)
    if damage != "a bad observation":
        assert str(tmp_path / "findings") in str(error.value)


def test_there_are_no_findings_in_an_empty_place(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        Findings.load(tmp_path)


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        replace(make_findings(), p_value=float("nan")).save(tmp_path / "findings")
    assert list(tmp_path.iterdir()) == []


def test_judged_by_hand() -> None:
    judgement = make_findings().judge(poison_at([1, 4], 5))
    assert (judgement.precision.successes, judgement.precision.trials) == (1, 2)
    assert (judgement.recall.successes, judgement.recall.trials) == (1, 2)
    assert (judgement.false_positives.successes, judgement.false_positives.trials) == (1, 3)
    # Scores 3, 3 (one of them poison), then 2 (poison): half the recall at 1/2, the other half at 2/3.
    assert judgement.average_precision == pytest.approx(0.5 * 1 / 2 + 0.5 * 2 / 3)
    assert json.loads(json.dumps(judgement.to_dict(), allow_nan=False))["recall"]["rate"] == 0.5


def test_judged_without_poison_or_flags_is_json_still() -> None:
    judgement = make_findings(flagged=[]).judge(poison_at([], 5))
    assert judgement.precision.trials == judgement.recall.trials == 0
    assert math.isnan(judgement.average_precision)
    assert json.loads(json.dumps(judgement.to_dict(), allow_nan=False))["average_precision"] is None


def test_poison_of_a_larger_set_is_refused() -> None:
    with pytest.raises(MismatchError, match="names example 5, the findings are of 5 examples"):
        make_findings().judge(poison_at([0, 5], 6))


def test_mask_and_ranking_with_ties_in_the_order_of_the_set() -> None:
    findings = make_findings()
    assert findings.ranking().tolist() == [1, 3, 4, 0, 2]
    assert findings.mask().tolist() == [False, True, False, True, False]
    assert len(findings) == 5
    assert make_findings([1.0] * 40, []).ranking().tolist() == list(range(40))


def slow_average_precision(scores: Tensor, truth: Tensor) -> float:
    """Sum over the distinct scores of the gain in recall times the precision."""
    total, recall = 0.0, 0.0
    for value in sorted(set(scores.tolist()), reverse=True):
        above = scores >= value
        hits = int((truth & above).sum())
        reached = hits / int(truth.sum())
        total += (reached - recall) * hits / int(above.sum())
        recall = reached
    return total


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=20))
def test_average_precision_is_the_area_step_by_step(rows: list[tuple[int, bool]]) -> None:
    scores = torch.tensor([float(score) for score, _ in rows])
    truth = torch.tensor([true for _, true in rows])
    if bool(truth.any()):
        assert average_precision(scores, truth) == pytest.approx(slow_average_precision(scores, truth))
    else:
        assert math.isnan(average_precision(scores, truth))
