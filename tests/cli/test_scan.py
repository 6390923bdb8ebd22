"""`unpoison scan` on the tiny story: what it writes, its status, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest

from unpoison.cli import main
from unpoison.detectors import Findings
from unpoison.runs import run_schema


def scan(story: Any, out: Path, *more: str) -> list[str]:
    return [
        *("scan", "--model", story.place("model"), "--data", story.data, "--poison", story.place("poison")),
        *("--out", str(out), *more),
    ]


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--method", "activation-clustering", "--preset", "comparison"),
        ("--method", "spectral-signatures", "--reference", "tiny.npz"),
        ("--method", "deep-knn", "--json"),
    ],
)
def test_scan_writes_findings(
    more: tuple[str, ...], story: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(story.folder)
    assert main(scan(story, tmp_path / "out", *more)) == 0
    record = story.read(tmp_path / "out")
    jsonschema.Draft202012Validator(run_schema()).validate(record)
    assert record["verb"] == "scan"
    found = Findings.load(tmp_path / "out" / record["artefacts"]["findings"])
    assert found.observation is None
    assert record["results"]["flagged"] == len(found.flagged)
    assert record["results"]["method"] == found.method
    assert record["results"]["average_precision"] is not None


def test_findings_can_fail_the_run_and_be_healed(story: Any, tmp_path: Path) -> None:
    method = ("--method", "spectral-signatures")
    assert main(scan(story, tmp_path / "found", *method, "--fail-on-findings")) == 1
    assert main(story.heal(tmp_path / "healed", tmp_path / "found", "--epochs", "1")) == 0
    assert story.read(tmp_path / "healed")["results"]["removed"] > 0


def test_scan_refuses(story: Any, fails: Any, tmp_path: Path) -> None:
    said = fails(scan(story, tmp_path / "out", "--method", "deep-knn", "--preset", "comparison"))
    assert said == "deep-knn: there is no preset 'comparison'; there are original"
    assert "starts from a wrong prediction" in fails(scan(story, tmp_path / "out", "--method", "ek-fac"))
    assert list(tmp_path.iterdir()) == []


def test_scan_is_documented() -> None:
    page = Path(__file__).parents[2].joinpath("docs", "command.md").read_text(encoding="utf-8")
    section = page.split("### Results of scan\n", 1)[1].split("\n##", 1)[0]
    definitions = run_schema()["$defs"]
    fields = {**definitions["findings"]["properties"], **definitions["scan"]["properties"]}
    assert not [name for name in fields if f"`{name}`" not in section]
