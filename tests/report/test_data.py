"""From run directories, as the command leaves them, to what the page shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from unpoison._statistics import Proportion
from unpoison.data import TrainingSet
from unpoison.detectors import Draw, Findings, Observation, Threshold
from unpoison.errors import InputError, MismatchError
from unpoison.report import Outcome, ReportData, write_report
from unpoison.threats import Backdoor, PatchTrigger, PoisonSet

N = 40


def run(path: Path, verb: str, **results: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    record = {
        "schema": 1,
        "verb": verb,
        "configuration": {"data": "sample"},
        "seed": 0,
        "versions": {"unpoison": "0.2.0"},
        "code": {"digest": "0" * 32, "commit": None},
        "device": {"type": "cpu"},
        "peak_memory_bytes": 1 << 30,
        "started": "2026-11-21T10:00:00+00:00",
        "seconds": {verb: 1.5},
        "results": results,
        "artefacts": {},
    }
    (path / "run.json").write_text(json.dumps(record))
    return path


def trace(path: Path, *, n: int = N, found: bool = True, threshold: float = 0.5) -> Path:
    scores = torch.linspace(0, 1, n)
    findings = Findings(
        method="delta-influence",
        configuration={"draws": 2},
        fingerprint="f" * 32,
        labels=torch.arange(n) % 2,
        class_names=("coat", "bag"),
        scores=scores,
        flagged=scores.argsort(descending=True)[: 4 if found else 0],
        threshold=Threshold(threshold, "chosen on clean examples", 0.01),
        poison_found=found,
        p_value=0.02,
        summary="a summary",
        evidence={"influence_before": scores, "influence_after": -scores, "collapses": scores.round()},
        observation=Observation(torch.zeros(1, 6, 6, dtype=torch.uint8), 1, 0),
        draws=(Draw("flip", 0), Draw("blur", 0)),
        draw_images=torch.zeros(2, 1, 6, 6, dtype=torch.uint8),
        seconds={"scores": 2.0},
        peak_bytes=1 << 30,
    )
    run(path, "trace")
    findings.save(path / "findings")
    top = findings.ranking()[:8]
    save_file(
        {"images": torch.zeros(8, 1, 6, 6, dtype=torch.uint8), "indices": top.contiguous()},
        path / "blamed.safetensors",
    )
    return path


def craft(path: Path, *, n: int = N) -> Path:
    clean = TrainingSet(
        torch.zeros(n, 1, 6, 6, dtype=torch.uint8), torch.zeros(n, dtype=torch.int64), ("coat", "bag")
    )
    indices = torch.arange(n - 5, n)
    PoisonSet.of(
        clean,
        indices=indices,
        images=torch.full((5, 1, 6, 6), 255, dtype=torch.uint8),
        given_labels=torch.ones(5, dtype=torch.int64),
        goal=Backdoor(PatchTrigger.white_corner(), source=0, target=1),
        attack="badnets",
        configuration={},
        seed=0,
    ).save(path / "poison")
    return run(path, "craft")


def test_four_runs_in_any_order(tmp_path: Path) -> None:
    rate = Proportion(9, 10)
    runs = [
        run(
            tmp_path / "healed",
            "heal",
            clean_accuracy_after=rate.to_dict(),
            attack_success_after=Proportion(0, 10).to_dict(),
        ),
        trace(tmp_path / "traced"),
        craft(tmp_path / "crafted"),
        run(tmp_path / "trained", "train", clean_accuracy=0.75, attack_success=Proportion(10, 10).to_dict()),
    ]
    data = ReportData.from_runs(runs)
    assert data.attack == "badnets"
    assert data.precision == Proportion(4, 4)
    assert data.recall == Proportion(4, 5)
    assert data.poison is not None
    assert data.poison.tolist() == [35, 36, 37, 38, 39]
    assert data.predicted == 1
    assert data.true_label == 0
    assert data.top_indices.tolist() == list(range(39, 31, -1))
    before, after = data.outcomes
    assert (before.name, before.clean_accuracy, before.attack_success) == (
        "Before healing",
        0.75,
        Proportion(10, 10),
    )
    assert (after.name, after.clean_accuracy, after.attack_success) == (
        "After healing",
        rate,
        Proportion(0, 10),
    )
    write_report(tmp_path / "report.html", runs)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Poison found: 4 of 40 training examples cause the prediction “bag” for this “coat”" in page
    assert "not measured" not in page
    assert "n not recorded" in page


def test_a_demo_holds_everything_in_one_directory(tmp_path: Path) -> None:
    demo = trace(craft(tmp_path / "demo"))
    run(
        demo,
        "demo",
        clean_accuracy_before=0.9,
        attack_success_before=0.98,
        clean_accuracy_after=0.9,
        attack_success_after=0.01,
        clean_accuracy_control=0.91,
        attack_success_control=None,
        measured={
            "clean_accuracy_before": Proportion(900, 1000).to_dict(),
            "attack_success_before": Proportion(98, 100).to_dict(),
            "attack_success_after": Proportion(1, 100).to_dict(),
        },
    )
    data = ReportData.from_runs([demo])
    assert data.outcomes == (
        Outcome("Before healing", Proportion(900, 1000), Proportion(98, 100)),
        Outcome("After healing", 0.9, Proportion(1, 100)),
        Outcome("Never poisoned", 0.91, None),
    )
    assert data.recall == Proportion(4, 5)


def test_without_the_truth_and_without_top_images(tmp_path: Path) -> None:
    traced = trace(tmp_path / "traced", found=False, threshold=float("inf"))
    (traced / "blamed.safetensors").unlink()
    data = ReportData.from_runs([traced])
    assert data.poison is None
    assert data.precision is None
    assert data.outcomes == ()
    assert data.top_images is None
    assert data.top_indices[0] == N - 1
    write_report(tmp_path / "report.html", [traced])
    assert "No poison found" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_what_cannot_be_shown_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one run directory"):
        ReportData.from_runs([])
    with pytest.raises(InputError, match="no such directory; give run directories"):
        ReportData.from_runs([tmp_path / "absent"])
    with pytest.raises(InputError, match=r"has no run\.json"):
        ReportData.from_runs([tmp_path])
    with pytest.raises(InputError, match=r"no findings in .*add the directory of a `trace` or `scan` run"):
        ReportData.from_runs([run(tmp_path / "t", "train")])
    with pytest.raises(InputError, match="a report is about one search"):
        ReportData.from_runs([trace(tmp_path / "one"), trace(tmp_path / "two")])
    damaged = trace(tmp_path / "damaged")
    (damaged / "blamed.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00nonsense")
    with pytest.raises(InputError, match=r"blamed\.safetensors: damaged"):
        ReportData.from_runs([damaged])
    (damaged / "run.json").write_text("{}")
    with pytest.raises(InputError, match="schema None is not known"):
        ReportData.from_runs([damaged])


def test_runs_of_different_training_sets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MismatchError):
        ReportData.from_runs([trace(tmp_path / "t"), craft(tmp_path / "c", n=2 * N)])


def test_a_failed_report_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        write_report(tmp_path / "report.html", [run(tmp_path / "t", "train")])
    assert not (tmp_path / "report.html").exists()
