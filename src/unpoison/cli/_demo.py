"""`unpoison demo`: the whole story on the bundled sample, told by the public API alone.

An adversary stamps a small white square on 75 of 5,000 pictures, sneakers all, and calls them pullovers.
A model trained on them is as accurate as one that was not, but takes any sneaker with the square for a
pullover. Somebody notices one such answer. From that one picture the training examples behind it are found,
removed, and the model is trained again.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from unpoison import attacks, data, detectors, report, unlearners
from unpoison._artefacts import atomic_file
from unpoison.cli._console import Console
from unpoison.cli._interrupts import Interrupts
from unpoison.cli._measuring import epochs, per_cent
from unpoison.cli._options import Demo
from unpoison.cli._session import Session, session
from unpoison.cli._tracing import keep_findings, observe, stages
from unpoison.data import TrainingSet
from unpoison.errors import UnpoisonError
from unpoison.evaluation import measure
from unpoison.threats import Backdoor, Budget, PatchTrigger
from unpoison.training import Recipe, Trained, predict, train

SOURCE, TARGET = "Sneaker", "Pullover"
_BUDGET = Budget(count=75)
PAGE = "report.html"


def demo(options: Demo, console: Console, interrupts: Interrupts) -> int:
    """Tell the story and keep all of it: poison/, model/, control/, findings/, healed/, the page."""
    with session(options, options.out, console, interrupts) as run:
        tell(run, seed=options.run.seed)
        with run.stage("report"):
            _write_page(run)
    _show(run, console, options.out)
    return 0


def tell(
    run: Session,
    *,
    seed: int,
    recipe: Recipe | None = None,
    splits: data.Splits | None = None,
    budget: Budget = _BUDGET,
) -> None:
    """Poison, train, look for a wrong prediction, trace it, heal, measure.

    Arguments:
        run: where artefacts and results go.
        seed: of everything.
        recipe: how every model is trained; the preset `sample` when None.
        splits: the data, with the two classes of the story; the bundled sample when None.
        budget: how much is poisoned.
    """
    recipe = Recipe.preset("sample") if recipe is None else recipe
    with run.stage("data"):
        splits = (data.sample() if splits is None else splits).to(run.device)
        if splits.test is None:
            raise UnpoisonError("demo: the sample has no test set")
        clean, test, names = splits.train, splits.test, splits.train.class_names

    with run.stage("craft"):
        backdoor = Backdoor(PatchTrigger.white_corner(), names.index(SOURCE), names.index(TARGET))
        poison = attacks.BadNets().craft(backdoor, clean, budget=budget, seed=seed)
        poison.save(run.artefact("poison", "poison"))
        poisoned = poison.apply(clean)
    run.console.say(
        f"{len(poison)} of {len(clean)} training images: {SOURCE} with a white corner, called {TARGET}"
    )

    def trained(stage: str, what: str, training_set: TrainingSet, place: str) -> Trained:
        with run.stage(stage), epochs(run.console, what, recipe) as on_epoch:
            model = train(training_set, recipe, seed=seed, on_epoch=on_epoch)
            model.save(run.artefact(place, place))
        return model

    victim = trained("train", "training on the poisoned set", poisoned, "model")
    control = trained("control", "training on the clean set, to compare", clean, "control")

    with run.stage("observe"):
        index = _wrong_prediction(victim, backdoor, test)
        image = backdoor.trigger.stamp(test.images[index : index + 1])[0]
        observation = observe(
            victim.model,
            poisoned,
            image,
            words=f"test image {index}",
            predicted=backdoor.target,
            true_label=backdoor.source,
        )
    run.console.say(
        f"somebody notices: test image {index}, a {SOURCE} with a white corner, is called {TARGET}"
    )

    with run.stage("trace"), stages(run.console, "tracing that one answer") as progress:
        detector = detectors.get("delta-influence", preset="calibrated", seed=seed)
        findings = detector.find(victim.model, poisoned, observation, progress=progress)
        keep_findings(run, findings, poisoned, poison)
    run.console.say(findings.summary)

    healed = victim
    if len(findings.flagged):
        with run.stage("heal"), epochs(run.console, "healing by retraining", recipe) as on_epoch:
            healed = unlearners.Retrain().heal(
                victim, poisoned, findings.flagged, seed=seed, on_epoch=on_epoch
            )
            healed.save(run.artefact("healed", "healed"))

    with run.stage("measure"):
        for name, model in (("before", victim), ("after", healed), ("control", control)):
            measurement = measure(model, test, backdoor)
            run.rate(f"clean_accuracy_{name}", measurement.clean_accuracy)
            run.rate(f"attack_success_{name}", measurement.attack_success)
    run.results.update(
        poisons=len(poison),
        examples=len(clean),
        observed=index,
        source=SOURCE,
        target=TARGET,
        recipe=recipe.to_dict(),
        fingerprint=poisoned.fingerprint,
    )


def _wrong_prediction(victim: Trained, backdoor: Backdoor, test: TrainingSet) -> int:
    """The first test image that the victim gets right, and wrong in the adversary's sense once stamped."""
    images, indices = backdoor.victims(test)
    right = predict(victim.model, test.images[indices]).argmax(1) == test.labels[indices]
    fooled = predict(victim.model, images).argmax(1) == backdoor.target
    found = indices[torch.logical_and(right, fooled)]
    if not len(found):
        raise UnpoisonError("demo: the poison had no effect with this seed; try another --seed")
    return int(found[0])


def _write_page(run: Session) -> None:
    """The page of this run, which does not have its final name yet."""
    run.recorder.artefacts["report"] = PAGE
    run.recorder.record().save(run.directory)
    case = report.Case.from_runs([run.directory])
    case = dataclasses.replace(
        case, runs=tuple(dataclasses.replace(one, name=run.out.name) for one in case.runs)
    )
    with atomic_file(run.directory / PAGE) as staging:
        staging.write_text(report.render(case), encoding="utf-8", newline="\n")


def _show(run: Session, console: Console, out: Path) -> None:
    from rich import box
    from rich.table import Table

    results = run.results
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("model")
    table.add_column("clean accuracy", justify="right")
    table.add_column("attack success", justify="right")
    for words, name in (
        ("trained on the poison", "before"),
        ("healed", "after"),
        ("never poisoned", "control"),
    ):
        table.add_row(
            words, per_cent(results[f"clean_accuracy_{name}"]), per_cent(results[f"attack_success_{name}"])
        )
    caught = results["measured"]["recall"]
    seconds = run.recorder.record().seconds["total"]
    console.show(
        f"From one wrong answer (test image {results['observed']}, a {SOURCE} called {TARGET}): "
        f"{results['flagged']} of {results['examples']} training images flagged,",
        f"{caught['successes']} of the {results['poisons']} poisoned ones among them "
        f"(recall {per_cent(results['recall'])}, precision {per_cent(results['precision'])}).",
        table,
        f"{seconds:.0f} seconds. Open {out / PAGE} to see the evidence.",
    )
