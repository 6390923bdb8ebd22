"""The scripts under examples/ run and do what they say; tests/training runs those of `ExternalTrainer`."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from unpoison.cli import main
from unpoison.data import encode_png
from unpoison.detectors import Findings

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name], capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_example_is_run_by_a_test() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.rglob("test_*.py"))
    assert not [path.name for path in EXAMPLES.rglob("*.py") if path.name not in tests]


def test_a_network_and_a_dataset_of_ones_own() -> None:
    said = run("own_model.py")
    before, after = (float(rate) for rate in re.findall(r"healing: ([\d.]+) %", said))
    assert before > 80
    assert after < 10
    assert "Poison found" in said


def test_importing_the_example_of_a_plugin_registers_it() -> None:
    code = f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import logit_neighbours; " + (
        "from unpoison import detectors; print(detectors.get('logit-neighbours', level=0.7))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "LogitNeighbours(level=0.7, batch_size=512)\n"


def commands_in(value: Any) -> Iterator[str]:
    """The commands of unpoison anywhere in a YAML file, in order."""
    if isinstance(value, dict):
        for one in value.values():
            yield from commands_in(one)
    elif isinstance(value, list):
        for one in value:
            yield from commands_in(one)
    elif isinstance(value, str):
        yield from (line for line in value.splitlines() if line.startswith("unpoison "))


def pipeline(name: str) -> Any:
    return yaml.safe_load((EXAMPLES / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/ and model/, as the pipelines expect them."""
    folder = tmp_path_factory.mktemp("repository")
    generator = torch.Generator().manual_seed(0)
    for number in range(24):
        place = folder / "photos" / ("dark", "light")[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        image = torch.randint(0, 128, (3, 8, 8), generator=generator, dtype=torch.uint8)
        place.write_bytes(encode_png(image + 120 * (number % 2)))
    small = ["--epochs", "1", "--width", "4", "--batch-size", "8"]
    data = ["--data", str(folder / "photos")]
    assert main(["train", *data, *small, "--out", str(folder / "model")]) == 0
    return folder


@pytest.mark.parametrize("name", ["ci/github_actions.yml", "ci/pre_commit.yaml", "dvc/dvc.yaml"])
def test_the_commands_of_a_pipeline_run(
    name: str, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(repository, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    commands = list(commands_in(pipeline(name)))
    assert commands
    assert sum("--fail-on-findings" in one for one in commands) == 1
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, command
    found = Findings.load("found/findings")
    assert not found.poison_found
    replace(found, poison_found=True, flagged=torch.tensor([3])).save("found/findings")
    again = shlex.split(commands[-1])[1:]
    if again[0] == "export":
        Path(again[again.index("--out") + 1]).unlink()
        assert main(again) == 1
        assert found.name_of(3) in Path(again[again.index("--out") + 1]).read_text(encoding="utf-8")


def test_the_workflow_uses_what_its_steps_write() -> None:
    [job] = pipeline("ci/github_actions.yml")["jobs"].values()
    written = {
        words[words.index("--out") + 1] for words in map(shlex.split, commands_in(job)) if "--out" in words
    }
    uses = {step["uses"].partition("@")[0]: step.get("with", {}) for step in job["steps"] if "uses" in step}
    assert uses["github/codeql-action/upload-sarif"]["sarif_file"] in written
    assert set(uses["actions/upload-artifact"]["path"].split()) <= written
    runs = [step.get("run", "") for step in job["steps"]]
    [gate] = [place for place, run in enumerate(runs) if "--fail-on-findings" in run]
    # What fails the job comes after everything that hands the findings on, but for what always runs.
    assert all(step.get("if") == "always()" for step in job["steps"][gate + 1 :])


def test_the_stages_of_dvc_depend_on_what_others_write() -> None:
    stages = pipeline("dvc/dvc.yaml")["stages"]
    written = {out for stage in stages.values() for out in stage["outs"]}
    assert {dep for stage in stages.values() for dep in stage["deps"]} - written == {"model", "photos"}
    for stage in stages.values():
        named = {word for command in commands_in(stage["cmd"]) for word in shlex.split(command)}
        assert set(stage["outs"]) | set(stage["deps"]) <= named
