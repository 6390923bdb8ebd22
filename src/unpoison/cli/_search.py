"""`unpoison trace` and `unpoison scan`: a model and its training set in, the examples to blame out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from unpoison import detectors, workflow
from unpoison.cli._console import Console, per_cent
from unpoison.cli._inputs import Subject, load_model, load_set, options_of, suspect_of
from unpoison.cli._interrupts import Interrupts
from unpoison.cli._options import Scan, Trace
from unpoison.cli._session import Session, session
from unpoison.data import TrainingSet, load
from unpoison.detectors import Findings, Observation
from unpoison.errors import InputError
from unpoison.threats import PoisonSet, find_class

DONE, FOUND = 0, 1
_KEPT_IMAGES = 64


def trace(options: Trace, console: Console, interrupts: Interrupts) -> int:
    """Trace the answer of `--model` to `--suspect` back to training examples."""
    return _search(options, console, interrupts)


def scan(options: Scan, console: Console, interrupts: Interrupts) -> int:
    """Search the training set of `--model` for poison."""
    return _search(options, console, interrupts)


def _search(options: Trace | Scan, console: Console, interrupts: Interrupts) -> int:
    verb = type(options).__name__.lower()
    detector = detectors.get(options.method, preset=options.preset, **options_of(options.option))
    with session(options, options.out, console, interrupts) as run:
        with run.stage("data"):
            splits, training_set, poison = load_set(options, run.device)
            reference = None if options.reference is None else load(options.reference).train.to(run.device)
            subject = load_model(options.model, options.architecture, training_set)
            asked: dict[str, Any] = {}
            if isinstance(options, Trace):
                suspect = suspect_of(options.suspect, splits, poison)
                observation = _observation(options, subject, training_set, suspect.image, suspect.true_label)
                asked = {"observation": observation}
        with run.stage(verb), console.progress(f"{verb} by {options.method}") as progress:
            find: Any = workflow.trace if asked else workflow.scan
            findings: Findings = find(
                subject.model,
                training_set,
                **asked,
                method=detector,
                reference=reference,
                seed=options.run.seed,
                progress=progress,
            )
        with run.stage("save"):
            keep_findings(run, findings, training_set, poison)
        run.results.update(
            method=findings.method, examples=len(training_set), fingerprint=training_set.fingerprint
        )
        if findings.observation is not None:
            names = training_set.class_names
            predicted, true_label = findings.observation.predicted, findings.observation.true_label
            run.results.update(
                suspect=suspect.words,
                predicted=None if predicted is None else names[predicted],
                true=None if true_label is None else names[true_label],
            )
    shown = ", ".join(map(str, run.results["flagged_indices"][:10]))
    console.show(
        findings.summary,
        *([f"most blamed: {shown}{', ...' if len(findings.flagged) > 10 else ''}"] if shown else []),
        *(
            [
                f"against the truth: precision {per_cent(run.results['precision'])}, "
                f"recall {per_cent(run.results['recall'])}"
            ]
            if poison is not None
            else []
        ),
        f"the findings are {options.out / 'findings'}",
    )
    return FOUND if options.fail_on_findings and findings.poison_found else DONE


def _observation(
    options: Trace, subject: Subject, training_set: TrainingSet, image: torch.Tensor, true_label: int | None
) -> Observation:
    names = training_set.class_names
    predicted = (
        None if options.predicted is None else find_class(options.predicted, names, option="--predicted")
    )
    if options.true is not None:
        true_label = find_class(options.true, names, option="--true")
    try:
        return detectors.check_observation(
            workflow.network_of(subject.model), training_set, Observation(image, predicted, true_label)
        )
    except InputError as error:
        raise InputError(f"--suspect {options.suspect}: {error}") from None


def keep_findings(
    run: Session, findings: Findings, training_set: TrainingSet, poison: PoisonSet | None
) -> None:
    """Write findings/ and blamed.safetensors, and record what was found; against the truth where it is
    known."""
    findings.save(run.artefact("findings", "findings"))
    _save_blamed(run.artefact("blamed", "blamed.safetensors"), findings, training_set)
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
    judgement = None if poison is None else findings.judge(poison)
    run.results["average_precision"] = None if judgement is None else judgement.average_precision
    run.rate("precision", None if judgement is None else judgement.precision)
    run.rate("recall", None if judgement is None else judgement.recall)
    if judgement is not None:
        run.rate("false_positives", judgement.false_positives)


def _save_blamed(path: Path, findings: Findings, training_set: TrainingSet) -> None:
    """Write the images of the most blamed examples, flagged ones first, for a report without the data set."""
    rest = findings.ranking().cpu()
    rest = rest[~torch.isin(rest, findings.flagged.cpu())]
    chosen = torch.cat([findings.flagged.cpu(), rest])[:_KEPT_IMAGES].contiguous()
    examples = training_set.subset(chosen).to("cpu")
    save_file(
        {"indices": chosen, "images": examples.images.contiguous(), "labels": examples.labels.contiguous()},
        path,
    )
