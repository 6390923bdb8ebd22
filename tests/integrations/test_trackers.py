"""A run in a real MLflow server and in Weights & Biases offline, where those are installed: `make compat`."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from unpoison.integrations import MLflow, WandB, metrics_of, parameters_of, track
from unpoison.runs import RunRecord

if find_spec("mlflow") and find_spec("flask"):  # mlflow-skinny has no server

    @pytest.fixture(scope="module")
    def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
        """The address of an MLflow server on this machine that keeps runs and artifacts in a folder."""
        folder = tmp_path_factory.mktemp("mlflow")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        stores = ["--backend-store-uri", f"sqlite:///{folder / 'runs.db'}"]
        stores += ["--artifacts-destination", str(folder / "kept"), "--workers", "1"]
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            *stores,
        ]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        try:
            for _ in range(600):
                assert process.poll() is None, (folder / "log").read_text()
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(timeout=60)

    @pytest.mark.filterwarnings("ignore")
    def test_a_server_of_mlflow_holds_the_numbers_of_run_json(runs: dict[str, Path], server: str) -> None:
        import mlflow

        mlflow.set_tracking_uri(server)
        identifier = mlflow.create_experiment("poison")
        for place in (runs["found"], runs["model"]):
            with mlflow.start_run(experiment_id=identifier) as run:
                track(place, MLflow())
            kept = mlflow.get_run(run.info.run_id).data
            record = RunRecord.load(place)
            assert kept.metrics == metrics_of(record)
            assert kept.params == {name: str(value) for name, value in parameters_of(record).items()}
            client = mlflow.MlflowClient()
            files = {one.path for one in client.list_artifacts(run.info.run_id, f"unpoison/{record.verb}")}
            report = {"unpoison/scan/report.html"} if place == runs["found"] else set()
            assert files == {f"unpoison/{record.verb}/run.json"} | report
            path = mlflow.artifacts.download_artifacts(
                run_id=run.info.run_id, artifact_path=f"unpoison/{record.verb}/run.json"
            )
            assert json.loads(Path(path).read_text()) == json.loads((place / "run.json").read_text())
        assert mlflow.active_run() is None
        # A further run of unpoison fits into the same run of MLflow.
        track(runs["found"], MLflow(run.info.run_id))
        kept_files = {one.path for one in client.list_artifacts(run.info.run_id, "unpoison")}
        assert kept_files == {"unpoison/scan", "unpoison/train"}


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
        wandb.teardown()  # the log is written by a process of its own, which ends with this
        [log] = tmp_path.rglob("*.wandb")
        content = log.read_bytes()
        assert b"unpoison-scan-report" in content
        assert b"unpoison/scan.flagged" in content
