"""Detectors that read influences from an index: the same findings as without one, for less."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from unpoison import detectors, workflow
from unpoison.detectors import Calibrated, Calibration, DeltaInfluence, EKFACThreshold, Search
from unpoison.errors import InputError, MismatchError
from unpoison.influence import AbsoluteDamping, InfluenceIndex


def calibrated(**settings: Any) -> Calibrated:
    return Calibrated(**{"false_alarm_level": 0.05, **settings})


@pytest.fixture(scope="module")
def index(scene: Any, tmp_path_factory: pytest.TempPathFactory) -> InfluenceIndex:
    """Of 600 examples, with 200 numbers each."""
    return InfluenceIndex.build(
        tmp_path_factory.mktemp("index") / "index",
        scene.model,
        scene.poisoned,
        factors=scene.factors,
        numbers=200,
        shard_examples=256,
    )


def search(scene: Any, detector: Any, **more: Any) -> Any:
    stages: list[str] = []
    found = detector.find(
        scene.model,
        scene.poisoned,
        scene.observation,
        reference=scene.held_out,
        progress=lambda stage, done, total, **_: stages.append(stage),
        **more,
    )
    return found, set(stages)


@pytest.mark.parametrize(
    "detector",
    [
        calibrated(),
        EKFACThreshold(threshold=1.0),
        EKFACThreshold(threshold=1.0, damping=AbsoluteDamping(1e-3)),
        DeltaInfluence(draws=10),
        *(
            detectors.get("delta-influence", preset=name)
            for name in detectors.describe("delta-influence").presets
        ),
    ],
    ids=lambda one: f"{one.method.name} {getattr(one, 'threshold', '')}",
)
def test_the_findings_are_those_without_it(scene: Any, index: InfluenceIndex, detector: Any) -> None:
    exact, _ = search(scene, detector, factors=scene.factors)
    # All that is flagged is scored again.
    found, stages = search(scene, detector, index=index, refine=600)
    again, _ = search(scene, detector, index=index, refine=600)
    assert torch.equal(again.scores, found.scores)
    known = found
    if isinstance(detector, Calibrated):
        # The baseline, by which seeds are chosen, is read from the index; with the exact one nothing differs.
        own = detector.calibrate(scene.model, scene.poisoned, scene.held_out, factors=scene.factors)
        kept = detector.calibrate(scene.model, scene.poisoned, scene.held_out, index=index)
        kept = replace(kept, centre=own.centre, spread=own.spread)
        assert len(set(found.flagged.tolist()) ^ set(exact.flagged.tolist())) <= 1
        known, _ = search(scene, detector, index=index, refine=600, calibration=kept)
    assert set(known.flagged.tolist()) == set(exact.flagged.tolist())
    assert found.poison_found == exact.poison_found
    assert not stages & {"covariance", "eigenvalues"}
    assert found.configuration["index"]["numbers"] == 200
    assert found.configuration["index"]["refined"] > 0
    assert "Read from an index of 200 numbers an example; " in found.summary
    assert "index" not in exact.configuration


def test_findings_and_summary_agree_on_how_many_are_exact(scene: Any, index: InfluenceIndex) -> None:
    found, _ = search(scene, calibrated(), index=index, refine=1)
    exact = found.configuration["index"]["refined"]
    assert exact > 1  # the seeds, too
    assert f"; {exact} examples scored again exactly" in found.summary


def test_without_refining_nothing_but_the_queries_is_computed(scene: Any, index: InfluenceIndex) -> None:
    for detector in (DeltaInfluence(draws=10), EKFACThreshold()):
        found, stages = search(scene, detector, index=index, refine=0)
        exact, _ = search(scene, detector, factors=scene.factors)
        assert stages == {"queries"}
        both = torch.stack([found.evidence["influence_before"], exact.evidence["influence_before"]]).double()
        assert float(torch.corrcoef(both)[0, 1]) > 0.97
        assert found.configuration["index"]["refined"] == 0
        assert found.summary.endswith("Read from an index of 200 numbers an example")


@pytest.mark.parametrize("gradient", ["loss", "measurement"])
def test_self_influence_is_that_of_the_gradient(scene: Any, index: InfluenceIndex, gradient: str) -> None:
    observation = detectors.check_observation(scene.model, scene.poisoned, scene.observation)
    given = (scene.model, scene.poisoned, observation, None, 0, None)
    found, exact = (
        Search(EKFACThreshold(), *given, factors, one).influence_on_the_answer(
            gradient=gradient, self_influence=True
        )
        for factors, one in ((None, index), (scene.factors, None))
    )
    assert torch.allclose(found.self_influence, exact.self_influence, rtol=1e-3)


def test_the_null_is_kept_in_the_index(scene: Any, index: InfluenceIndex) -> None:
    first, _ = search(scene, calibrated(), index=index)
    times = {path: path.stat().st_mtime_ns for path in index.calibration.rglob("*") if path.is_file()}
    assert times
    second, stages = search(scene, calibrated(), index=InfluenceIndex.open(index.directory))
    assert times == {path: path.stat().st_mtime_ns for path in index.calibration.rglob("*") if path.is_file()}
    assert "calibration" not in stages
    assert second.p_value == first.p_value
    assert torch.equal(second.scores, first.scores)


def test_an_index_and_a_calibration_belong_together(
    scene: Any, index: InfluenceIndex, tmp_path: Path
) -> None:
    exact = calibrated().calibrate(scene.model, scene.poisoned, scene.held_out, factors=scene.factors)
    through = calibrated().calibrate(scene.model, scene.poisoned, scene.held_out, index=index)
    through.save(tmp_path / "kept")
    assert Calibration.load(tmp_path / "kept").index == index.digest
    search(scene, calibrated(), index=index, calibration=through)
    for given in ({"calibration": exact, "index": index}, {"calibration": through}):
        with pytest.raises(MismatchError, match="not made through the same index"):
            search(scene, calibrated(), **given)
    with pytest.raises(MismatchError, match="an index with the damping"):
        search(scene, calibrated(damping=AbsoluteDamping(1.0)), index=index)


def test_what_cannot_use_an_index_says_so(scene: Any, index: InfluenceIndex) -> None:
    with pytest.raises(InputError, match="trak: reads no index"):
        search(scene, detectors.get("trak"), index=index)
    with pytest.raises(
        InputError, match="trak reads no index; calibrated, delta-influence, ek-fac, gradient-clusters do"
    ):
        workflow.trace(scene.model, scene.poisoned, scene.observation, method="trak", index=index)
    with pytest.raises(InputError, match="refine is for an index alone"):
        workflow.trace(scene.model, scene.poisoned, scene.observation, method="ek-fac", refine=3)
    with pytest.raises(InputError, match="refine must be at least 0"):
        search(scene, EKFACThreshold(), index=index, refine=-1)
    with pytest.raises(MismatchError, match="another training set"):
        EKFACThreshold().find(scene.model, scene.held_out, scene.observation, index=index)
    with pytest.raises(MismatchError, match="in the modules"):
        search(scene, EKFACThreshold(modules=("0",)), index=index)


def test_the_workflow_makes_and_uses_one(scene: Any, tmp_path: Path) -> None:
    made = workflow.index(tmp_path / "index", scene.model, scene.poisoned, numbers=100)
    assert len(made) == len(scene.poisoned)
    found = workflow.trace(
        scene.model, scene.poisoned, scene.observation, method="ek-fac", index=made, refine=5
    )
    assert found.configuration["index"]["refined"] == 5
    grown = workflow.index(tmp_path / "index", scene.model, scene.held_out, append=True)
    assert len(grown) == len(scene.poisoned) + len(scene.held_out)


def test_an_estimate_is_near_what_is_made(scene: Any, tmp_path: Path) -> None:
    estimate = InfluenceIndex.estimate(scene.model, scene.poisoned, numbers=64)
    assert estimate.examples == len(scene.poisoned)
    assert estimate.seconds(2) < estimate.seconds(1)
    made = InfluenceIndex.build(tmp_path / "index", scene.model, scene.poisoned, numbers=64)
    size = sum(path.stat().st_size for path in made.directory.rglob("*") if path.is_file())
    assert (estimate.numbers, estimate.sketch) == (made.numbers, made.settings["sketch"])
    assert estimate.disk_bytes == pytest.approx(size, rel=0.3)
