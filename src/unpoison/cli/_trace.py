"""`unpoison trace`: a model, its training set and one wrong prediction in; the examples to blame out."""

from __future__ import annotations

from unpoison import detectors
from unpoison.cli._console import Console
from unpoison.cli._inputs import label_of, load_data, load_model, load_poison, suspect_of
from unpoison.cli._interrupts import Interrupts
from unpoison.cli._measuring import per_cent
from unpoison.cli._options import Trace
from unpoison.cli._session import session
from unpoison.cli._tracing import keep_findings, observe, stages

DONE, FOUND = 0, 1


def trace(options: Trace, console: Console, interrupts: Interrupts) -> int:
    """Trace the answer of `--model` to `--suspect` back to training examples."""
    detector = detectors.get(
        options.method,
        preset=options.preset,
        false_alarm_level=options.false_alarm_level,
        seed=options.run.seed,
    )
    with session(options, options.out, console, interrupts) as run:
        with run.stage("data"):
            splits = load_data(options.data, options.test_data, run.device)
            poison = load_poison(options.poison)
            training_set = splits.train if poison is None else poison.apply(splits.train)
            names = training_set.class_names
            reference = None
            if options.reference is not None:
                reference = load_data(options.reference, None, run.device).train
            subject = load_model(options.model, options.architecture, training_set)
            suspect = suspect_of(options.suspect, splits, poison)
            observation = observe(
                subject.module,
                training_set,
                suspect.image,
                words=suspect.words,
                predicted=None
                if options.predicted is None
                else label_of(options.predicted, names, "--predicted"),
                true_label=suspect.true_label
                if options.true is None
                else label_of(options.true, names, "--true"),
            )
        console.say(f"{suspect.words}: the model says {names[observation.predicted]}")
        with run.stage("trace"), stages(console, f"tracing by {options.method}") as progress:
            findings = detector.find(
                subject.module, training_set, observation, reference=reference, progress=progress
            )
        with run.stage("save"):
            keep_findings(run, findings, training_set, poison)
        true_label = observation.true_label
        run.results.update(
            method=findings.method,
            suspect=suspect.words,
            predicted=names[observation.predicted],
            true=None if true_label is None else names[true_label],
            examples=len(training_set),
            fingerprint=training_set.fingerprint,
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
