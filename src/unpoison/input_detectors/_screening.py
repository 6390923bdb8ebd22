"""`Screening`: what every test-time detector returns: a score and a p-value for each input.

On disk a screening is a directory: `screening.json` (everything that is not a column) and `inputs.parquet`
(one row an input).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from unpoison._artefacts import atomic_directory, read_record, write_json
from unpoison.errors import InputError, one_line

_FORMAT = 1
_PARTS = ("method", "configuration", "threshold", "how", "false_positive_rate", "calibrated_on", "seconds")


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Screening:
    """Which inputs look triggered, as far as a test-time detector can tell.

    Arguments:
        method: the detector's name.
        configuration: its settings and the seed, as JSON values.
        scores: Float64[m]; a higher score is stronger evidence of a trigger.
        p_values: Float64[m] in (0, 1]: the share of the calibration examples, and the input itself, that
            score at least as high. Of a clean input it is uniform or larger (a conformal p-value).
        flagged: Int64[k], the inputs that score above the threshold; the highest first.
        threshold: the score above which an input is flagged.
        how: how it was chosen.
        false_positive_rate: the share of clean inputs that may be flagged; None for a published threshold,
            which controls none.
        calibrated_on: how many clean examples the scores are compared with.
        answers: Int64[m], what the model predicts.
        class_names: the names of the classes.
        ids: m names of files, where the inputs have them.
        seconds: by stage.
        peak_bytes: the highest memory of the process, or of the GPU, up to the end.
    """

    method: str
    configuration: Mapping[str, Any]
    scores: Tensor
    p_values: Tensor
    flagged: Tensor
    threshold: float
    how: str
    false_positive_rate: float | None
    calibrated_on: int
    answers: Tensor
    class_names: tuple[str, ...]
    ids: Sequence[str] | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_bytes: int = 0

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def summary(self) -> str:
        """The outcome in one sentence."""
        level = self.false_positive_rate
        clean = "" if level is None else f"; of clean inputs {100 * level:g} % would be"
        return f"{len(self.flagged)} of {len(self)} inputs are flagged as triggered{clean}"

    def name_of(self, index: int) -> str:
        """What people call an input: its id, or else its index."""
        return str(index) if self.ids is None else self.ids[index]

    def ranking(self) -> Tensor:
        """Int64[m]: all inputs, the highest score first; ties in their order."""
        return self.scores.argsort(descending=True, stable=True)

    def suspects(self) -> Tensor:
        """Int64[j]: the flagged inputs that get the answer that most of them get; the highest score first.

        A trace takes inputs with one answer: `Observation(inputs[screening.suspects()[:3]])`.
        """
        if not len(self.flagged):
            return self.flagged
        answers = self.answers[self.flagged]
        return self.flagged[answers == torch.bincount(answers).argmax()]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the screening as a directory, in one step."""
        table = pa.table(
            {
                "index": torch.arange(len(self)).numpy(),
                **({} if self.ids is None else {"id": list(self.ids)}),
                "score": self.scores.numpy(),
                "p_value": self.p_values.numpy(),
                "answer": self.answers.numpy(),
            }
        )
        record = {
            "format": _FORMAT,
            **{name: getattr(self, name) for name in _PARTS},
            "flagged": self.flagged.tolist(),
            "class_names": list(self.class_names),
            "peak_bytes": self.peak_bytes,
        }
        with atomic_directory(path) as staging:
            pq.write_table(table, staging / "inputs.parquet")
            write_json(staging / "screening.json", record)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Screening:
        """Read a screening that `save` wrote.

        Raises:
            InputError: the directory is none of a screening, or a file in it is damaged.
        """
        folder = Path(path)
        record = read_record(folder / "screening.json", _FORMAT, "screenings")
        try:
            table = pq.read_table(folder / "inputs.parquet")
            columns = {
                name: torch.from_numpy(table[name].to_numpy().copy())
                for name in ("score", "p_value", "answer")
            }
            return cls(
                **{name: record[name] for name in _PARTS},
                scores=columns["score"],
                p_values=columns["p_value"],
                answers=columns["answer"],
                flagged=torch.tensor(record["flagged"], dtype=torch.int64),
                class_names=tuple(record["class_names"]),
                ids=tuple(table["id"].to_pylist()) if "id" in table.column_names else None,
                peak_bytes=record["peak_bytes"],
            )
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{folder}: damaged screening ({type(error).__name__}: {one_line(error)})"
            ) from None
