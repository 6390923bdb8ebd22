"""`unpoison trace` and `unpoison scan`: a model and its training set in, the examples to blame out."""

from __future__ import annotations

import torch
from safetensors.torch import save_file

from unpoison import detectors, workflow
from unpoison.cli._console import Console, per_cent
from unpoison.cli._inputs import load_model, load_set, options_of, reference_of, told_of
from unpoison.cli._interrupts import Interrupts
from unpoison.cli._options import Scan, Trace
from unpoison.cli._session import Session, session
from unpoison.cli._status import status_of
from unpoison.cli._tracing import Tracing
from unpoison.data import Examples, TrainingSet
from unpoison.detectors import Findings, Observation
from unpoison.errors import printable
from unpoison.influence import InfluenceIndex
from unpoison.threats import PoisonSet

_KEPT_IMAGES = 64


def trace(options: Trace, console: Console, interrupts: Interrupts) -> int:
    """Trace the answer of `--model` to `--suspect` back to training examples."""
    with session(options, options.out, console, interrupts) as run:
        with run.stage("data"):
            case = Tracing.of(options, run)
        with run.stage("trace"), console.progress(f"trace by {options.tracing.method}") as progress:
            case.calibrate(run, progress)
            findings = workflow.trace(
                case.subject.model, case.training_set, case.observation, progress=progress, **case.given
            )
        with run.stage("save"):
            keep_findings(run, findings, case.training_set, case.poison)
        run.results.update(method=findings.method, **case.asked())
    missed = "a trace may miss some of it: unpoison repair removes what it finds and traces the healed model"
    console.show(*told(run, findings), *case.told(), *([missed] if findings.poison_found else []))
    console.show(f"the findings are {options.out / 'findings'}")
    return status_of(options, findings)


def scan(options: Scan, console: Console, interrupts: Interrupts) -> int:
    """Search the training set of `--model` for poison."""
    detector = detectors.get(options.method, preset=options.preset, **options_of(options.option))
    with session(options, options.out, console, interrupts) as run:
        with run.stage("data"), run.reading() as reading:
            splits, training_set, poison = load_set(options, run.device, progress=reading)
            run.note(splits)
            reference = reference_of(options.reference, options, run.device)
            subject = load_model(options.model, options.architecture, training_set, run.device)
        with run.stage("scan"), console.progress(f"scan by {options.method}") as progress:
            findings = workflow.scan(
                subject.model,
                training_set,
                method=detector,
                reference=reference,
                index=None if options.index is None else InfluenceIndex.open(options.index),
                task=subject.task,
                seed=options.run.seed,
                progress=progress,
            )
        with run.stage("save"):
            keep_findings(run, findings, training_set, poison)
        run.results.update(method=findings.method, **told_of(training_set))
    console.show(*told(run, findings), f"the findings are {options.out / 'findings'}")
    return status_of(options, findings)


def told(run: Session, findings: Findings) -> list[str]:
    """The findings in lines, against the truth where it is known."""
    lines, results = [findings.summary], run.results
    level = findings.threshold.false_alarm_level
    if findings.p_value is not None and level is not None:
        lines.append(f"p = {findings.p_value:.3g} at a false-alarm level of {level:g}")
    if len(findings.flagged):
        shown = ", ".join(printable(findings.name_of(index)) for index in findings.flagged[:10].tolist())
        lines.append(f"most blamed: {shown}{', ...' if len(findings.flagged) > 10 else ''}")
    if results["precision"] is not None or results["recall"] is not None:
        lines.append(
            f"against the truth: precision {per_cent(results['precision'])}, recall "
            f"{per_cent(results['recall'])}"
        )
    return lines


def keep_findings(run: Session, findings: Findings, training_set: Examples, poison: PoisonSet | None) -> None:
    """Write findings/ and blamed.safetensors, and record what was found; against the truth where it is
    known."""
    findings.save(run.artefact("findings", "findings"))
    _save_blamed(run, findings, training_set)
    run.results.update(
        poison_found=findings.poison_found,
        flagged=len(findings.flagged),
        flagged_indices=findings.flagged.tolist(),
        flagged_ids=None
        if findings.ids is None
        else [findings.ids[index] for index in findings.flagged.tolist()],
        p_value=findings.p_value,
        cause=None if findings.cause is None else findings.cause.to_dict(),
        false_alarm_level=findings.threshold.false_alarm_level,
        threshold=findings.threshold.value,
        tracked_share=findings.tracked_share,
        untracked=list(findings.untracked),
        summary=findings.summary,
        detector_seconds=dict(findings.seconds),
    )
    judgement = None if poison is None else findings.judge(poison)
    run.results["average_precision"] = None if judgement is None else judgement.average_precision
    run.rate("precision", None if judgement is None else judgement.precision)
    run.rate("recall", None if judgement is None else judgement.recall)
    if judgement is not None:
        run.rate("false_positives", judgement.false_positives)


def _save_blamed(run: Session, findings: Findings, training_set: Examples) -> None:
    """Write the images of the most blamed examples, flagged ones first, for a report without the data set.

    What is shown of a set that is not held is `Observation.pictures`; nothing of inputs that are no images.
    """
    rest = findings.ranking().cpu()
    rest = rest[~torch.isin(rest, findings.flagged.cpu())]
    chosen = torch.cat([findings.flagged.cpu(), rest])[:_KEPT_IMAGES].contiguous()
    if isinstance(training_set, TrainingSet):
        examples = training_set.subset(chosen).to("cpu")
        images, labels = examples.images, examples.labels
    else:
        inputs, labels, *_ = training_set.at(chosen)
        shown = Observation(inputs, count=len(chosen)).pictures
        if shown is None or shown.ndim != 4 or shown.shape[1] not in (1, 3):
            return
        images = shown
    save_file(
        {"indices": chosen, "images": images.contiguous(), "labels": labels.contiguous()},
        run.artefact("blamed", "blamed.safetensors"),
    )
