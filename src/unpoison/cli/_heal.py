"""`unpoison heal`: a model and findings in, a model that forgot the flagged examples out."""

from __future__ import annotations

from unpoison import unlearners, workflow
from unpoison.cli._console import Console
from unpoison.cli._inputs import (
    given_of,
    healing_recipe,
    load_findings,
    load_model,
    load_set,
    options_of,
    reference_of,
    told_of,
)
from unpoison.cli._interrupts import Interrupts
from unpoison.cli._options import Heal
from unpoison.cli._session import session
from unpoison.cli._status import DONE
from unpoison.cli._train_command import training_by
from unpoison.errors import InputError
from unpoison.training import Trained


def heal(options: Heal, console: Console, interrupts: Interrupts) -> int:
    """Heal `--model` of what `--findings` flagged, save the healed model, measure it before and after."""
    _check_used(options)
    unlearner = unlearners.get(options.method, preset=options.preset, **options_of(options.option))
    with session(options, options.out, console, interrupts) as run:
        with run.stage("data"), run.reading() as reading:
            findings = None if options.findings is None else load_findings(options.findings)
            like = None if findings is None else findings.fingerprint
            splits, training_set, poison = load_set(options, run.device, like=like, progress=reading)
            run.note(splits)
            try:
                if findings is not None:
                    workflow.check_findings(findings, training_set)
            except InputError as error:
                raise type(error)(f"--findings {options.findings}: {error}") from None
            reference = reference_of(options.reference, options, run.device)
            subject = load_model(options.model, options.architecture, training_set, run.device)
            trained = subject.model if isinstance(subject.model, Trained) else None
            command = options.train_command
            retrain = None
            if command is not None:
                retrain = training_by(command, subject.build, training_set.ids, seed=options.run.seed)
            recipe = None if retrain is not None else healing_recipe(options.training, subject.model)
        method = options.method if retrain is None else "--train-command"
        removed = 0 if findings is None else len(findings.flagged)
        with run.stage("heal"), console.progress(f"healing by {method}") as progress:
            healed = workflow.heal(
                subject.model,
                training_set,
                findings,
                method=unlearner,
                reference=reference,
                recipe=recipe,
                start=None if retrain is not None else subject.fresh(unlearner),
                retrain=retrain,
                task=subject.task,
                seed=options.run.seed,
                device=run.device,
                progress=progress,
            )
            healed.save(run.artefact("model", "model"))
        with run.stage("measure"):
            run.measure(subject.model, splits.test, poison, when="before", task=subject.task)
            run.measure(healed, splits.test, poison, when="after", task=subject.task)
        run.results.update(
            method=method,
            removed=removed,
            recipe=None if healed.recipe is None else healed.recipe.to_dict(),
            tuning=None if healed.tuning is None else dict(healed.tuning),
            **told_of(training_set),
            healing_seconds=healed.seconds,
            training_seconds=None if trained is None else trained.seconds,
        )
    console.show(
        f"healed by {method}"
        + (f": {removed} of {len(training_set)} examples forgotten" if removed else " without known poison"),
        *run.compared(),
        *_tuned(healed),
        f"healing took {healed.seconds:.1f} s"
        + ("" if trained is None else f"; training the model took {trained.seconds:.1f} s"),
        f"the healed model is {options.out / 'model'}",
    )
    return DONE


def _tuned(healed: Trained) -> list[str]:
    """How an optimiser and a learning rate were found, in a line."""
    if healed.tuning is None:
        return []
    return [
        "no recipe was given, so {optimizer} at a learning rate of {learning_rate:g} was found on {held_out} "
        "clean examples in {seconds:.1f} s".format(**healed.tuning)
    ]


def _check_used(options: Heal) -> None:
    """That a method has what it needs, and that nothing is given that it does not use."""
    needed = unlearners.describe(options.method)
    if options.findings is None and (needed.needs_findings or options.train_command is not None):
        forgetter = options.method if options.train_command is None else "--train-command"
        raise InputError(
            f"--findings: {forgetter} needs the examples to forget; give a run of trace, scan or repair, or "
            f"a --method that needs none: {_by_reference()}"
        )
    if options.findings is None and needed.uses_reference and options.reference is None:
        raise InputError(
            f"--reference: {options.method} needs clean examples; give some, or --findings, whose unflagged "
            "examples it then uses"
        )
    if options.reference is not None and not needed.uses_reference:
        raise InputError(
            f"--reference: {options.method} does not use one; leave it out, or heal by {_by_reference()}"
        )
    given = [*(["--method"] if options.method != "retrain" else []), *given_of(options.training)]
    if options.train_command is not None and given:
        raise InputError(
            f"{given[0]}: is not used with --train-command, whose program does the training; leave it out"
        )


def _by_reference() -> str:
    known = map(unlearners.describe, unlearners.names())
    return ", ".join(one.name for one in known if one.uses_reference)
