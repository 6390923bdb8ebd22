"""`unpoison scan`: a model and its training set in, the examples that look like poison out."""

from __future__ import annotations

from unpoison import detectors
from unpoison.cli._console import Console
from unpoison.cli._inputs import load_data, load_model, load_poison
from unpoison.cli._interrupts import Interrupts
from unpoison.cli._measuring import per_cent
from unpoison.cli._options import Scan
from unpoison.cli._session import session
from unpoison.cli._tracing import keep_findings, stages

DONE, FOUND = 0, 1


def scan(options: Scan, console: Console, interrupts: Interrupts) -> int:
    """Search the training set of `--model` for poison."""
    detector = detectors.get(options.method, preset=options.preset, seed=options.run.seed)
    with session(options, options.out, console, interrupts) as run:
        with run.stage("data"):
            splits = load_data(options.data, options.test_data, run.device)
            poison = load_poison(options.poison)
            training_set = splits.train if poison is None else poison.apply(splits.train)
            reference = None
            if options.reference is not None:
                reference = load_data(options.reference, None, run.device).train
            subject = load_model(options.model, options.architecture, training_set)
        with run.stage("scan"), stages(console, f"scanning by {options.method}") as progress:
            findings = detector.find(subject.module, training_set, reference=reference, progress=progress)
        with run.stage("save"):
            keep_findings(run, findings, training_set, poison)
        run.results.update(
            method=findings.method, examples=len(training_set), fingerprint=training_set.fingerprint
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
