"""From a folder of photographs of many sizes to lists of files, without a change to any of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from unpoison.cli import main
from unpoison.detectors import Findings, Threshold


def photographs(root: Path) -> dict[str, bytes]:
    """24 photographs of different sizes in three classes, a note among them; what each file holds."""
    generator = torch.Generator().manual_seed(0)
    for row in range(24):
        shape = (3, 12 + row % 4, 10 + row % 3)
        noise = torch.randint(0, 90, shape, generator=generator) + 60 * (row % 3)
        path = root / "abc"[row % 3] / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.to(torch.uint8).permute(1, 2, 0).numpy()).save(path)
    (root / "a" / "notes.txt").write_text("about a")
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_from_a_folder_to_a_quarantine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = photographs(tmp_path / "photos")
    model, found = str(tmp_path / "model"), tmp_path / "found"
    data = ["--data", str(tmp_path / "photos"), "--size", "8"]
    small = ["--epochs", "1", "--width", "4", "--batch-size", "8", "--no-flip"]
    assert main(["train", *data, *small, "--out", model]) == 0
    record = json.loads((tmp_path / "model" / "run.json").read_text())
    assert record["results"]["recipe"]["flip"] is False
    assert any("resized to 8 pixels" in note for note in record["results"]["notes"])
    assert any("1 files passed over" in note and "notes.txt" in note for note in record["results"]["notes"])
    method = ["--method", "spectral-signatures", "--option", "expected_share=0.4"]
    table = tmp_path / "clean.csv"
    rows = [f"photos/{place.parent.name}/{place.name},{place.parent.name}" for place in map(Path, before)]
    table.write_text("\n".join(["path,label", *(row for row in rows if ".txt" not in row)]))
    method += ["--reference", str(table)]
    assert main(["scan", "--model", model, *data, *method, "--out", str(found)]) == 0
    said = capsys.readouterr()
    assert "mirrored" not in said.out
    results = json.loads((found / "run.json").read_text())["results"]
    names = results["flagged_ids"]
    assert names
    assert all((tmp_path / "photos" / name).is_file() for name in names)
    assert names[0] in said.out

    def export(form: str, place: str, *more: str) -> Path:
        out = tmp_path / place
        assert main(["export", str(found), "--as", form, "--out", str(out), *more]) == 0
        return out

    assert export("list", "bad.txt").read_text().split() == names
    others = export("unflagged-list", "keep.txt").read_text().split()
    assert len(others) == 24 - len(names)
    assert not set(others) & set(names)
    rows = list(csv.DictReader(export("csv", "all.csv").read_text().splitlines()))
    assert [row["id"] for row in rows if row["flagged"] == "True"] == [
        row["id"] for row in rows if row["id"] in names
    ]
    assert pq.read_table(export("parquet", "all.parquet")).num_rows == 24
    told = json.loads(export("json", "bad.json").read_text())
    assert [row["id"] for row in told["flagged"]] == names
    linked = export("folder", "quarantine", "--files", str(tmp_path / "photos"))
    for name in names:
        assert (linked / name).samefile(tmp_path / "photos" / name)
    assert {
        str(path): path.read_bytes() for path in (tmp_path / "photos").rglob("*") if path.is_file()
    } == before


@pytest.mark.parametrize(
    ("ids", "arguments", "words"),
    [
        (None, ["--as", "folder", "--files", "."], "name no files"),
        (("a/1.png", "a/2.png"), ["--as", "folder"], "--files"),
        (("a/1.png", "a/2.png"), ["--as", "folder", "--files", "."], "no such file"),
        (("../1.png", "a/2.png"), ["--as", "folder", "--files", "."], "outside"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, ids: Any, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    findings(ids).save(tmp_path / "findings")
    assert main(["export", str(tmp_path), *arguments, "--out", "quarantine"]) == 2
    assert words in capsys.readouterr().err
    assert not Path("quarantine").exists()


def test_what_holds_no_findings_is_named(tmp_path: Path, capsys: Any) -> None:
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "all.csv")]) == 2
    assert f"error: export {tmp_path}: holds neither findings/findings.json" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path: Path, capsys: Any) -> None:
    findings(None).save(tmp_path / "findings")
    (tmp_path / "kept.csv").write_text("mine")
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "kept.csv")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "kept.csv").read_text() == "mine"


def findings(ids: tuple[str, ...] | None) -> Findings:
    return Findings(
        method="deep-knn",
        configuration={},
        fingerprint="abc",
        labels=torch.tensor([0, 1]),
        class_names=("a", "b"),
        scores=torch.tensor([2.0, 0.0]),
        flagged=torch.tensor([0]),
        threshold=Threshold(1.0, "by hand"),
        poison_found=True,
        p_value=None,
        summary="1 of 2",
        ids=ids,
    )
