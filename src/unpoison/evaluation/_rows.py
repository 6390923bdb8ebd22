"""The row of a trial: how the adversary's inputs are answered, what was found, removed and spent."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from unpoison._artefacts import read_json
from unpoison.data import TrainingSet
from unpoison.detectors import Findings
from unpoison.errors import InputError, nearest
from unpoison.evaluation._results import ROW
from unpoison.input_detectors import Screening
from unpoison.threats import Goal, PoisonSet
from unpoison.training import Trained, predict

Values = Mapping[str, Any]
Inputs = Mapping[str, Path]
NOTHING = "nothing"
"""The method of findings where the victim gives no answer to trace."""


def write_row(out: Path, row: Values, costs: Values) -> None:
    """Write `row.parquet`; what the row does not say is null."""
    unknown = sorted({*row, *costs} - set(ROW.names))
    if unknown:
        raise InputError(f"a row has no column {unknown[0]!r}; {nearest(unknown[0], ROW.names)}")
    columns = {name: [row.get(name, costs.get(name))] for name in ROW.names}
    pq.write_table(
        pa.table(columns, schema=ROW), out / "row.parquet", compression="none", use_dictionary=False
    )


def answers(model: Trained, goal: Goal, test: TrainingSet) -> dict[str, Any]:
    """How the adversary's inputs are answered: by what margin, and how many with their own class."""
    images, places = goal.victims(test)
    logits = predict(model.model, images).cpu()
    own = goal.own_labels(test, places)
    return {
        "margin": float(goal.margin(logits, own).mean()),
        "attack_correct": int((logits.argmax(1) == own).sum()),
    }


def judged(
    findings: Findings, poison: PoisonSet | None, training_set: TrainingSet, control: str
) -> dict[str, Any]:
    """What a detector or a filter found, held against the truth."""
    flagged, labels, classes = findings.mask(), training_set.labels.cpu(), training_set.num_classes
    clean = torch.ones_like(flagged) if poison is None else ~poison.membership(len(training_set))
    scanned = findings.observation is None and findings.method != NOTHING
    row = {
        "observed": None if control or scanned else findings.method != NOTHING,
        "found": None if control or findings.method == NOTHING else findings.poison_found,
        "p_value": findings.p_value,
        "cause": None if findings.cause is None else findings.cause.kind,
        "flagged": len(findings.flagged),
        "true_positives": int((flagged & ~clean).sum()),
        "false_positives": int((flagged & clean).sum()),
        "clean_examples": int(clean.sum()),
        "class_false_positives": torch.bincount(labels[flagged & clean], minlength=classes).tolist(),
        "class_clean": torch.bincount(labels[clean], minlength=classes).tolist(),
    }
    return row if poison is None else {**row, "average_precision": findings.judge(poison).average_precision}


def screened(place: Path) -> dict[str, Any]:
    """What a test-time detector says of clean and of triggered inputs, at two false-positive rates.

    A published threshold has one rate, its own, which then stands for both.
    """
    clean = Screening.load(place / "clean")
    triggered = Screening.load(place / "triggered") if (place / "triggered").exists() else None
    row: dict[str, Any] = {"screened_clean": len(clean)}
    for name, level in (("01", 0.01), ("05", 0.05)):
        row[f"screened_false_{name}"] = _flagged(clean, level)
        row[f"screened_true_{name}"] = 0 if triggered is None else _flagged(triggered, level)
    row["screened_triggered"] = 0 if triggered is None else len(triggered)
    if triggered is not None:
        row["screened_auroc"] = auroc(triggered.scores, clean.scores)
    return row


def _flagged(screening: Screening, level: float) -> int:
    if screening.false_positive_rate is None:
        return len(screening.flagged)
    return int((screening.p_values <= level).sum())


def auroc(higher: Tensor, lower: Tensor) -> float:
    """How often one of Float[a] is above one of Float[b], a tie counting half; neither may be empty.

    >>> auroc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]))
    0.875
    """
    ordered = lower.sort().values
    below = torch.searchsorted(ordered, higher) + torch.searchsorted(ordered, higher, right=True)
    return float(below.double().mean()) / (2 * len(lower))


def healing(healed: Path, poison: PoisonSet | None) -> dict[str, Any]:
    """What a repair removed, and how it ended."""
    record = read_json(healed / "repair.json")
    removed = torch.tensor(record["removed"], dtype=torch.int64)
    poisons = 0 if poison is None else int(torch.isin(removed, poison.indices.cpu()).sum())
    ended = {"outcome": record["outcome"], "rounds": record["rounds"]}
    return {**ended, "removed": len(removed), "removed_poisons": poisons}


def dropped(victim: Path, poison: PoisonSet | None, examples: int) -> dict[str, int]:
    """How much a defense had dropped by the last epoch, and how much of it was poison."""
    trained = Trained.load(victim / "model")
    poisons = 0 if poison is None else int(poison.membership(examples)[trained.dropped].sum())
    return {"dropped": len(trained.dropped), "dropped_poisons": poisons, "examples": examples}


def costs(inputs: Inputs) -> dict[str, float]:
    names = {
        "poison": "craft",
        "victim": "train",
        "calibration": "calibrate",
        "findings": "find",
        "screening": "screen",
        "healed": "heal",
    }
    records = {
        names[name]: read_json(place / "stage.json") for name, place in inputs.items() if name in names
    }
    costs = {f"seconds_{name}": record["seconds"] for name, record in records.items()}
    return {**costs, "peak_bytes": max(record["peak_bytes"] for record in records.values())}
