"""`Findings`: what every detector returns: scores, flagged examples, the threshold and the evidence.

On disk findings are a directory: `findings.json` (everything that is not an array), `examples.parquet` (one
row a training example, for people and for queries) and `tensors.safetensors` (the observation and its
transforms).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from unpoison._artefacts import atomic_directory, read_record, write_json
from unpoison._statistics import Proportion
from unpoison.detectors._cause import Cause
from unpoison.detectors._observation import Observation
from unpoison.errors import InputError, MismatchError, one_line
from unpoison.threats import PoisonSet

_FORMAT = 1


@final
@dataclass(frozen=True)
class Threshold:
    """The score above which an example is flagged.

    Arguments:
        value: in the unit of the scores.
        how: how it was chosen, in words.
        false_alarm_level: the stated probability that a wrong prediction without poison is called poisoned,
            where the method controls it.
    """

    value: float
    how: str
    false_alarm_level: float | None = None


@final
@dataclass(frozen=True)
class Draw:
    """One transformation and relabelling of the observation."""

    name: str
    label: int


@final
@dataclass(frozen=True)
class Judgement:
    """Findings compared with the truth.

    Arguments:
        precision: the share of the flagged examples that are poison.
        recall: the share of the poison that is flagged.
        false_positives: the share of the clean examples that are flagged.
        average_precision: the area under the precision-recall curve of the scores; NaN without poison.
    """

    precision: Proportion
    recall: Proportion
    false_positives: Proportion
    average_precision: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "precision": self.precision.to_dict(),
            "recall": self.recall.to_dict(),
            "false_positives": self.false_positives.to_dict(),
            "average_precision": None if math.isnan(self.average_precision) else self.average_precision,
        }


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Findings:
    """The training examples that are responsible, as far as a detector can tell.

    Arguments:
        method: the detector's name.
        configuration: its settings and the seed, as JSON values.
        fingerprint: of the training set the indices belong to.
        labels: Int64[n], the labels of the training set.
        class_names: the names of its classes.
        scores: Float[n]; a higher score is stronger evidence.
        flagged: Int64[k]; the highest score first.
        threshold: the decision and how it was chosen.
        poison_found: the decision. When it is False nothing is flagged.
        p_value: how often a wrong prediction without poison has evidence at least as strong; None where the
            method has none.
        summary: the finding in one sentence.
        cause: what kind of cause the examples speak for, where the method tells.
        evidence: Float[n] columns by name, what the scores were made from.
        observation: what was traced; None for detectors that need none.
        draws: the transformations and labels that were tried, in order.
        draw_images: UInt8[draws c h w], the observation under each of them.
        seconds: by stage.
        peak_bytes: the highest memory of the process, or of the GPU, up to the end of the search.
        tracked_share: the share of the model's parameters whose influence was measured, for detectors by
            influence.
        untracked: the names of the other parameters.
        ids: n names of files or keys of rows, where the training set has them.
    """

    method: str
    configuration: Mapping[str, Any]
    fingerprint: str
    labels: Tensor
    class_names: tuple[str, ...]
    scores: Tensor
    flagged: Tensor
    threshold: Threshold
    poison_found: bool
    p_value: float | None
    summary: str
    cause: Cause | None = None
    evidence: Mapping[str, Tensor] = field(default_factory=dict)
    observation: Observation | None = None
    draws: tuple[Draw, ...] = ()
    draw_images: Tensor | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    ids: Sequence[str] | None = None
    tracked_share: float | None = None
    untracked: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.scores)

    def name_of(self, index: int) -> str:
        """What people call an example: its id, or else its index."""
        return str(index) if self.ids is None else self.ids[index]

    def mask(self) -> Tensor:
        """Bool[n]: which examples are flagged."""
        mask = torch.zeros(len(self), dtype=torch.bool)
        mask[self.flagged] = True
        return mask

    def ranking(self) -> Tensor:
        """Int64[n]: all examples, the highest score first; ties in the order of the training set."""
        return self.scores.argsort(descending=True, stable=True)

    def judge(self, poison_set: PoisonSet) -> Judgement:
        """Compare the findings with the truth.

        Raises:
            MismatchError: the poison's indices do not fit this training set.
        """
        if len(poison_set.indices) and int(poison_set.indices.max()) >= len(self):
            raise MismatchError(
                f"the poison set names example {int(poison_set.indices.max())}, the findings are of "
                f"{len(self)} examples; give the findings of the set that it was applied to"
            )
        truth = torch.zeros(len(self), dtype=torch.bool)
        truth[poison_set.indices.cpu()] = True
        flagged = self.mask()
        true_positives = int((flagged & truth).sum())
        return Judgement(
            precision=Proportion(true_positives, int(flagged.sum())),
            recall=Proportion(true_positives, int(truth.sum())),
            false_positives=Proportion(int((flagged & ~truth).sum()), int((~truth).sum())),
            average_precision=average_precision(self.scores, truth),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the findings as a directory, in one step."""
        tensors: dict[str, Tensor] = {"flagged": self.flagged.cpu().contiguous()}
        if self.observation is not None:
            given = self.observation.given
            named = given if isinstance(given, Mapping) else {"": given}
            # Pictures have been saved under the bare name from the first format on.
            tensors |= {
                f"observation.{name}" if name else "observation": part for name, part in named.items()
            }
        if self.draw_images is not None:
            tensors["draw_images"] = self.draw_images.cpu().contiguous()
        table = pa.table(
            {
                "index": torch.arange(len(self)).numpy(),
                **({} if self.ids is None else {"id": list(self.ids)}),
                "label": self.labels.cpu().numpy(),
                "score": self.scores.cpu().double().numpy(),
                "flagged": self.mask().numpy(),
                **{
                    f"evidence.{name}": column.cpu().double().numpy()
                    for name, column in self.evidence.items()
                },
            }
        )
        record = {
            "format": _FORMAT,
            "method": self.method,
            "configuration": dict(self.configuration),
            "fingerprint": self.fingerprint,
            "class_names": list(self.class_names),
            "threshold": {**asdict(self.threshold), "value": _finite(self.threshold.value)},
            "poison_found": self.poison_found,
            "p_value": self.p_value,
            "summary": self.summary,
            "cause": None if self.cause is None else self.cause.to_dict(),
            "draws": [asdict(draw) for draw in self.draws],
            "observation": None
            if self.observation is None
            else {
                "predicted": self.observation.predicted,
                "true_label": self.observation.true_label,
                "indices": list(self.observation.indices),
                "answered": self.observation.answered,
                "count": self.observation.count,
            },
            "tracked_share": self.tracked_share,
            "untracked": list(self.untracked),
            "seconds": dict(self.seconds),
            "peak_bytes": self.peak_bytes,
        }
        with atomic_directory(path) as staging:
            pq.write_table(table, staging / "examples.parquet")
            save_file(tensors, staging / "tensors.safetensors")
            write_json(staging / "findings.json", record)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Findings:
        """Read findings that `save` wrote.

        Raises:
            InputError: the directory is not one of findings, or a file in it is damaged.
        """
        folder = Path(path)
        record = read_record(folder / "findings.json", _FORMAT, "findings")
        try:
            table = pq.read_table(folder / "examples.parquet")
            tensors = load_file(folder / "tensors.safetensors")
            observation, threshold = record["observation"], record["threshold"]
            ids = tuple(table["id"].to_pylist()) if "id" in table.column_names else None
            columns = {
                name: torch.from_numpy(table[name].to_numpy().copy())
                for name in table.column_names
                if name != "id"
            }
            flagged = tensors["flagged"]
            marked = columns["flagged"].nonzero()[:, 0]
            if not torch.equal(flagged.sort().values, marked):
                raise InputError(
                    f"{folder}: damaged findings (examples.parquet and tensors.safetensors flag different "
                    "examples)"
                )
            return cls(
                method=record["method"],
                configuration=record["configuration"],
                fingerprint=record["fingerprint"],
                labels=columns["label"],
                class_names=tuple(record["class_names"]),
                scores=columns["score"],
                flagged=flagged,
                threshold=Threshold(
                    **{
                        **threshold,
                        "value": float("inf") if threshold["value"] is None else threshold["value"],
                    }
                ),
                poison_found=record["poison_found"],
                p_value=record["p_value"],
                summary=record["summary"],
                cause=None if record.get("cause") is None else Cause(**record["cause"]),
                evidence={
                    name.removeprefix("evidence."): column
                    for name, column in columns.items()
                    if name.startswith("evidence.")
                },
                observation=None if observation is None else Observation(_observed(tensors), **observation),
                draws=tuple(Draw(**draw) for draw in record["draws"]),
                draw_images=tensors.get("draw_images"),
                seconds=record["seconds"],
                peak_bytes=record["peak_bytes"],
                ids=ids,
                tracked_share=record.get("tracked_share"),
                untracked=tuple(record.get("untracked", ())),
            )
        except (OSError, pa.ArrowException, safetensors.SafetensorError, KeyError, TypeError) as error:
            raise InputError(
                f"{folder}: damaged findings ({type(error).__name__}: {one_line(error)})"
            ) from None


def _observed(tensors: Mapping[str, Tensor]) -> Tensor | dict[str, Tensor]:
    if "observation" in tensors:
        return tensors["observation"]
    prefix = "observation."
    return {name.removeprefix(prefix): part for name, part in tensors.items() if name.startswith(prefix)}


def average_precision(scores: Tensor, truth: Tensor) -> float:
    """Area under the precision-recall curve of Float[n] `scores` for Bool[n] `truth`; NaN for none true.

    >>> average_precision(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([True, False, True]))
    0.833...
    """
    from sklearn.metrics import average_precision_score

    if not bool(truth.any()):
        return float("nan")
    return float(
        average_precision_score(truth.cpu().numpy(), torch.nan_to_num(scores.double()).cpu().numpy())
    )


def _finite(value: float) -> float | None:
    return value if value not in (float("inf"), float("-inf")) else None
