"""A run in a real local MLflow and in Weights & Biases offline, where those are installed: `make compat`."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from unpoison.integrations import MLflow, WandB, metrics_of, parameters_of, track
from unpoison.runs import RunRecord

if find_spec("mlflow"):

    @pytest.mark.filterwarnings("ignore")
    def test_mlflow_holds_the_numbers_of_run_json(
        runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import mlflow

        monkeypatch.chdir(tmp_path)
        mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
        identifier = mlflow.create_experiment("poison", artifact_location=(tmp_path / "kept").as_uri())
        for place in (runs["found"], runs["model"]):
            with mlflow.start_run(experiment_id=identifier) as run:
                track(place, MLflow())
            kept = mlflow.get_run(run.info.run_id).data
            record = RunRecord.load(place)
            assert kept.metrics == metrics_of(record)
            assert kept.params == {name: str(value) for name, value in parameters_of(record).items()}
            files = {one.path for one in mlflow.MlflowClient().list_artifacts(run.info.run_id, "unpoison")}
            report = {"unpoison/report.html"} if place == runs["found"] else set()
            assert files == {"unpoison/run.json"} | report
        assert mlflow.active_run() is None
        # A further run of unpoison fits into the same run of MLflow.
        track(runs["found"], MLflow(run.info.run_id))


if find_spec("wandb"):

    @pytest.mark.filterwarnings("ignore")
    def test_wandb_offline_holds_the_numbers_of_run_json(
        runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import wandb

        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_SILENT", "true")
        record = RunRecord.load(runs["found"])
        with wandb.init(project="poison", dir=tmp_path) as run:
            track(runs["found"], WandB())
            summary: dict[str, Any] = {
                name: value for name, value in dict(run.summary).items() if name.startswith("unpoison/")
            }
            assert summary == {f"unpoison/{name}": value for name, value in metrics_of(record).items()}
            assert json.loads(json.dumps(dict(run.config)["unpoison"])) == parameters_of(record)
        [log] = tmp_path.rglob("*.wandb")
        content = log.read_bytes()
        assert b"unpoison-report" in content
        assert b"unpoison/scan.flagged" in content
