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
            findings = load_findings(options.findings)
            splits, training_set, poison = load_set(
                options, run.device, like=findings.fingerprint, progress=reading
            )
            run.note(splits)
            try:
                workflow.check_findings(findings, training_set)
            except InputError as error:
                raise type(error)(f"--findings {options.findings}: {error}") from None
            subject = load_model(options.model, options.architecture, training_set, run.device)
            trained = subject.model if isinstance(subject.model, Trained) else None
            command = options.train_command
            retrain = None
            if command is not None:
                retrain = training_by(command, subject.build, training_set.ids, seed=options.run.seed)
            recipe = None if retrain is not None else healing_recipe(options.training, subject.model)
        method = options.method if retrain is None else "--train-command"
        with run.stage("heal"), console.progress(f"healing by {method}") as progress:
            healed = workflow.heal(
                subject.model,
                training_set,
                findings,
                method=unlearner,
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
            removed=len(findings.flagged),
            recipe=None if healed.recipe is None else healed.recipe.to_dict(),
            tuning=None if healed.tuning is None else dict(healed.tuning),
            **told_of(training_set),
            healing_seconds=healed.seconds,
            training_seconds=None if trained is None else trained.seconds,
        )
    console.show(
        f"healed by {method}: {len(findings.flagged)} of {len(training_set)} examples forgotten",
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
    """That nothing which says how to heal is given beside a training program."""
    given = [*(["--method"] if options.method != "retrain" else []), *given_of(options.training)]
    if options.train_command is not None and given:
        raise InputError(f"{given[0]}: --train-command makes no use of it; the program trains by itself")
