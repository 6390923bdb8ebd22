"""`unpoison heal`: a model and findings in, a model that forgot the flagged examples out."""

from __future__ import annotations

from unpoison import unlearners
from unpoison.cli._console import Console
from unpoison.cli._inputs import load_data, load_findings, load_model, load_poison, recipe_of
from unpoison.cli._interrupts import Interrupts
from unpoison.cli._measuring import measured, per_cent
from unpoison.cli._options import Heal
from unpoison.cli._session import session
from unpoison.errors import InputError, MismatchError


def heal(options: Heal, console: Console, interrupts: Interrupts) -> int:
    """Heal `--model` of what `--findings` flagged, save the healed model, measure it before and after."""
    unlearner = unlearners.get(options.method)
    with session(options, options.out, console, interrupts) as run:
        with run.stage("data"):
            splits = load_data(options.data, options.test_data, run.device)
            poison = load_poison(options.poison)
            training_set = splits.train if poison is None else poison.apply(splits.train)
            findings = load_findings(options.findings)
            if findings.fingerprint != training_set.fingerprint:
                raise MismatchError(
                    f"--findings {options.findings}: they are of another training set than --data"
                    + (
                        f" {options.data}"
                        if poison is None
                        else f" {options.data} with --poison {options.poison}"
                    )
                    + "; give the data and the poison that they were made with"
                )
            if not len(findings.flagged):
                raise InputError(
                    f"--findings {options.findings}: nothing is flagged, so there is nothing to heal"
                )
            subject = load_model(options.model, options.architecture, training_set)
            recipe = recipe_of(
                options.training, base=None if subject.trained is None else subject.trained.recipe
            )
        with (
            run.stage("heal"),
            console.progress(f"healing by {options.method}", unlearner.epochs_in(recipe), "epochs") as step,
        ):
            healed = unlearner.heal(
                subject.for_healing,
                training_set,
                findings.flagged,
                recipe=recipe,
                seed=options.run.seed,
                on_epoch=lambda record: step(record.epoch + 1, f"loss {record.loss:.3f}"),
            )
            healed.save(run.artefact("model", "model"))
        with run.stage("measure"):
            measurements = {
                "before": measured(subject.module, splits.test, poison),
                "after": measured(healed, splits.test, poison),
            }
        for when, measurement in measurements.items():
            run.rate(f"clean_accuracy_{when}", None if measurement is None else measurement.clean_accuracy)
            run.rate(f"attack_success_{when}", None if measurement is None else measurement.attack_success)
        run.results.update(
            method=options.method,
            removed=len(findings.flagged),
            examples=len(training_set),
            recipe=healed.recipe.to_dict(),
            fingerprint=training_set.fingerprint,
            healing_seconds=healed.seconds,
            training_seconds=None if subject.trained is None else subject.trained.seconds,
        )
    results = run.results
    console.show(
        f"healed by {options.method}: {len(findings.flagged)} of {len(training_set)} examples forgotten",
        *(
            f"{words}: {per_cent(results[f'{name}_before'])} before, "
            f"{per_cent(results[f'{name}_after'])} after"
            for name, words in (("clean_accuracy", "clean accuracy"), ("attack_success", "attack success"))
            if results[f"{name}_before"] is not None
        ),
        f"healing took {healed.seconds:.1f} s"
        + ("" if subject.trained is None else f"; training the model took {subject.trained.seconds:.1f} s"),
        f"the healed model is {options.out / 'model'}",
    )
    return 0
