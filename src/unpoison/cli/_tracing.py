"""From a suspect to findings on disk; shared by `trace` and `demo`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from unpoison.cli._console import Console
from unpoison.cli._session import Session
from unpoison.data import TrainingSet
from unpoison.detectors import Findings, Observation
from unpoison.errors import InputError
from unpoison.threats import PoisonSet
from unpoison.training import predict

BLAMED = 64


@contextmanager
def stages(console: Console, what: str) -> Iterator[Callable[[str, int, int], None]]:
    """Yield a detector's `progress`, which shows how far each of its passes has come."""
    with console.progress(what, None, "examples") as step:
        yield lambda stage, done, total: step(done, stage, total)


def observe(
    model: nn.Module,
    training_set: TrainingSet,
    image: Tensor,
    *,
    words: str,
    predicted: int | None,
    true_label: int | None,
) -> Observation:
    """The observation that the model answers UInt8[c h w] `image` wrongly.

    Arguments:
        model: asked for its answer.
        training_set: names the classes.
        image: the suspect.
        words: what to call it in messages.
        predicted: what somebody says the answer is; None takes the model's word.
        true_label: what the answer ought to be, where that is known.

    Raises:
        InputError: the model answers something else, or it answers right.
    """
    names = training_set.class_names
    answer = int(predict(model, image[None].to(training_set.device)).argmax(1))
    if predicted is not None and predicted != answer:
        raise InputError(
            f"--predicted {names[predicted]}: the model takes {words} for {names[answer]} (label {answer}); "
            f"leave --predicted out, or check that --model and --suspect belong together"
        )
    if true_label == answer:
        raise InputError(
            f"--suspect: the model takes {words} for {names[answer]}, which is right; "
            f"there is nothing to trace"
        )
    return Observation(image, answer, true_label)


def keep_findings(
    run: Session, findings: Findings, training_set: TrainingSet, poison: PoisonSet | None
) -> None:
    """Write findings/ and blamed.safetensors, and note what was found; against the truth where it is
    known."""
    findings.save(run.artefact("findings", "findings"))
    save_blamed(run.artefact("blamed", "blamed.safetensors"), findings, training_set)
    run.results.update(
        poison_found=findings.poison_found,
        flagged=len(findings.flagged),
        flagged_indices=findings.flagged.tolist(),
        p_value=findings.p_value,
        false_alarm_level=findings.threshold.false_alarm_level,
        threshold=findings.threshold.value,
        summary=findings.summary,
        detector_seconds=dict(findings.seconds),
    )
    run.results.update(judged(run, findings, poison))


def judged(run: Session, findings: Findings, poison: PoisonSet | None) -> dict[str, Any]:
    """Precision, recall and average precision, null where the truth is not known."""
    if poison is None:
        return {"precision": None, "recall": None, "average_precision": None}
    judgement = findings.judge(poison)
    run.rate("precision", judgement.precision)
    run.rate("recall", judgement.recall)
    run.rate("clean_lost", judgement.clean_lost)
    return {"average_precision": judgement.average_precision}


def save_blamed(path: Path, findings: Findings, training_set: TrainingSet) -> None:
    """Write the images of the most blamed examples, what is flagged first, so that a report needs no data
    set."""
    rest = findings.ranking().cpu()
    rest = rest[~torch.isin(rest, findings.flagged.cpu())]
    chosen = torch.cat([findings.flagged.cpu(), rest])[:BLAMED].contiguous()
    examples = training_set.subset(chosen).to("cpu")
    save_file(
        {"indices": chosen, "images": examples.images.contiguous(), "labels": examples.labels.contiguous()},
        path,
    )
