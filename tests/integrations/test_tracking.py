"""What trackers are told: the numbers of run.json, each rate with its n and interval."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from unpoison.errors import InputError, MissingExtraError
from unpoison.integrations import MLflow, WandB, metrics_of, parameters_of, track
from unpoison.runs import RunRecord


class Notebook:
    """A tracker that remembers."""

    def __init__(self) -> None:
        self.told: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}

    def parameters(self, values: Mapping[str, Any]) -> None:
        self.told["parameters"] = dict(values)

    def metrics(self, values: Mapping[str, float]) -> None:
        self.told["metrics"] = dict(values)

    def artefact(self, verb: str, path: Path) -> None:
        self.files[f"{verb}/{path.name}"] = path.read_bytes()


def test_a_tracker_is_told_the_numbers_of_run_json(runs: dict[str, Path]) -> None:
    for name in ("model", "found"):
        notebook, record = Notebook(), json.loads((runs[name] / "run.json").read_text())
        track(runs[name], notebook)
        verb, results = record["verb"], record["results"]
        assert all(key.startswith(f"{verb}.") for part in notebook.told.values() for key in part)
        metrics = {key.removeprefix(f"{verb}."): one for key, one in notebook.told["metrics"].items()}
        assert results["measured"]
        for rate, value in results["measured"].items():
            assert metrics[f"{rate}.n"] == value["trials"]
            assert [metrics[rate], metrics[f"{rate}.low"], metrics[f"{rate}.high"]] == [
                value["rate"],
                *value["interval"],
            ]
        numbers = {key: one for key, one in results.items() if isinstance(one, int | float)}
        assert numbers.items() <= metrics.items()
        assert metrics["seconds.total"] == record["seconds"]["total"]
        parameters = {key.removeprefix(f"{verb}."): one for key, one in notebook.told["parameters"].items()}
        assert parameters["fingerprint"] == results["fingerprint"]
        assert parameters["seed"] == record["seed"]
        assert parameters["data"].endswith("tiny.npz")
        assert "test_data" not in parameters
        assert json.loads(notebook.files[f"{verb}/run.json"]) == record
        assert (f"{verb}/report.html" in notebook.files) == (name == "found")


def test_the_report_is_of_all_runs(runs: dict[str, Path]) -> None:
    notebook = Notebook()
    track(runs["found"], notebook, others=[runs["poison"]])
    assert b"badnets" in notebook.files["scan/report.html"]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    notebook = Notebook()
    with pytest.raises(InputError, match="no such file"):
        track(tmp_path, notebook)
    assert not notebook.told


def test_a_rate_without_trials_has_no_interval(runs: dict[str, Path]) -> None:
    record = RunRecord.load(runs["model"])
    empty = {"rate": None, "successes": 0, "trials": 0, "interval": [None, None]}
    record.results["measured"]["recall"] = empty
    assert metrics_of(record)["train.recall.n"] == 0
    assert "train.recall.low" not in metrics_of(record)
    assert parameters_of(record)["train.epochs"] == 1


def test_wandb_keeps_the_parameters_of_several_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Config(dict[str, Any]):
        def update(self, values: Mapping[str, Any], *, allow_val_change: bool) -> None:  # type: ignore[override]
            super().update(values)  # a value that is a mapping is replaced, as by W&B

    run = SimpleNamespace(config=Config(lr=0.1))
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))
    for values in ({"craft.seed": 1}, {"trace.seed": 2}):
        WandB(run).parameters(values)
    assert run.config == {"lr": 0.1, "unpoison": {"craft.seed": 1, "trace.seed": 2}}


@pytest.mark.parametrize(("tracker", "package"), [(MLflow, "mlflow"), (WandB, "wandb")])
def test_a_tracker_without_a_run_says_so(tracker: Any, package: str) -> None:
    error: Any = InputError if find_spec(package) else MissingExtraError
    with pytest.raises(error, match=r"no run is active|is not installed; pip install"):
        tracker()
