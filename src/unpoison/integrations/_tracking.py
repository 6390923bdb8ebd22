"""A run directory in an experiment tracker, by three calls: parameters, metrics and artefacts.

    import mlflow
    from unpoison.integrations import MLflow, track

    with mlflow.start_run():
        track("found", MLflow())

Parameters are the configuration, the seed, the versions and the fingerprint of the training set; metrics all
numbers of `run.json`, each rate with its n and the bounds of its 95 % Wilson interval; artefacts `run.json`
and, where the run holds findings, the report. Where they go is the tracker's: unpoison opens no connection.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, final

from unpoison.errors import InputError, MissingExtraError
from unpoison.report import write_report
from unpoison.runs import RECORD, RunRecord

Parameter = str | int | float | bool


class Tracker(Protocol):
    """What takes a run down; one of these three methods is called after another."""

    def parameters(self, values: Mapping[str, Parameter]) -> None:
        """Take down what the run was given."""
        ...

    def metrics(self, values: Mapping[str, float]) -> None:
        """Take down what came of it."""
        ...

    def artefact(self, verb: str, path: Path) -> None:
        """Keep a copy of a file of a run of this verb; the next verb may have a file of that name as well."""
        ...


def track(
    run: str | os.PathLike[str], tracker: Tracker, *, others: Sequence[str | os.PathLike[str]] = ()
) -> None:
    """Hand a run directory to a tracker.

    Arguments:
        run: the directory, of any verb.
        tracker: `MLflow()`, `WandB()`, or one of your own.
        others: further runs for the report, such as those of `craft` and `heal`.

    Raises:
        InputError: the directory is none, or the runs do not belong together.
    """
    folder = Path(run)
    record = RunRecord.load(folder)
    tracker.parameters(parameters_of(record))
    tracker.metrics(metrics_of(record))
    tracker.artefact(record.verb, folder / RECORD)
    if any((Path(one) / "findings").is_dir() for one in (run, *others)):
        with tempfile.TemporaryDirectory(prefix="unpoison-") as place:
            page = Path(place) / "report.html"
            write_report(page, [folder, *others])
            tracker.artefact(record.verb, page)


def parameters_of(record: RunRecord) -> dict[str, Parameter]:
    """What a run was given, and what it was run with, as `VERB.NAME`; what was not given is left out.

    The verb stands before each name, so that several runs of unpoison fit into one of the tracker. Lists are
    joined by spaces, as on the command line.
    """
    results = record.results
    values: dict[str, Any] = {
        **record.configuration,
        "seed": record.seed,
        **{f"version.{name}": value for name, value in record.versions.items()},
        **{f"code.{name}": value for name, value in record.code.items()},
        "device.name": record.device.get("name"),
        **{name: results.get(name) for name in ("fingerprint", "method", "attack", "outcome", "suspect")},
    }
    joined = {
        name: " ".join(map(str, value)) if isinstance(value, list | tuple) else value
        for name, value in values.items()
    }
    return {
        f"{record.verb}.{name}": value
        for name, value in joined.items()
        if isinstance(value, str | int | float | bool) and value != ""
    }


def metrics_of(record: RunRecord) -> dict[str, float]:
    """All numbers of a run as `VERB.NAME`, and of a rate also `.n`, `.low` and `.high`; null is left out."""
    values: dict[str, Any] = {
        **record.results,
        **{f"seconds.{name}": value for name, value in record.seconds.items()},
        "peak_memory_bytes": record.peak_memory_bytes,
    }
    for name, rate in (record.results.get("measured") or {}).items():
        values[f"{name}.n"] = rate["trials"]
        if rate["trials"]:
            values[f"{name}.low"], values[f"{name}.high"] = rate["interval"]
    return {
        f"{record.verb}.{name}": float(value)
        for name, value in values.items()
        if isinstance(value, int | float | bool)
    }


@final
class MLflow:
    """A run of MLflow.

    Arguments:
        run_id: of the run; the active one when None.

    Raises:
        MissingExtraError: neither mlflow nor mlflow-skinny is installed.
        InputError: no run is active.
    """

    def __init__(self, run_id: str | None = None) -> None:
        self._mlflow = _imported("mlflow")
        active = self._mlflow.active_run()
        if run_id is None and active is None:
            raise InputError("MLflow: no run is active; use `with mlflow.start_run():`, or give run_id")
        self.run_id: str = active.info.run_id if run_id is None else run_id

    def parameters(self, values: Mapping[str, Parameter]) -> None:
        """As parameters."""
        self._mlflow.log_params(dict(values), run_id=self.run_id)

    def metrics(self, values: Mapping[str, float]) -> None:
        """As metrics."""
        self._mlflow.log_metrics(dict(values), run_id=self.run_id)

    def artefact(self, verb: str, path: Path) -> None:
        """As an artifact in `unpoison/VERB/`."""
        self._mlflow.log_artifact(str(path), artifact_path=f"unpoison/{verb}", run_id=self.run_id)


@final
class WandB:
    """A run of Weights & Biases.

    Arguments:
        run: what `wandb.init` returned; the active run when None.

    Raises:
        MissingExtraError: wandb is not installed.
        InputError: no run is active.
    """

    def __init__(self, run: Any = None) -> None:
        self._wandb = _imported("wandb")
        self.run: Any = self._wandb.run if run is None else run
        if self.run is None:
            raise InputError("WandB: no run is active; call wandb.init, or give its run")

    def parameters(self, values: Mapping[str, Parameter]) -> None:
        """Into the configuration, under `unpoison`, beside those of earlier runs."""
        known = dict(self.run.config).get("unpoison", {})
        self.run.config.update({"unpoison": {**known, **values}}, allow_val_change=True)

    def metrics(self, values: Mapping[str, float]) -> None:
        """Into the summary, as `unpoison/NAME`; they are no step of a training."""
        self.run.summary.update({f"unpoison/{name}": value for name, value in values.items()})

    def artefact(self, verb: str, path: Path) -> None:
        """As the artifact `unpoison-VERB-NAME`, of the type `unpoison`."""
        artifact = self._wandb.Artifact(f"unpoison-{verb}-{path.stem}", type="unpoison")
        artifact.add_file(str(path))
        self.run.log_artifact(artifact)


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingExtraError(f"{name} is not installed; pip install {name}") from None
