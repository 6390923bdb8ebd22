"""`unpoison demo`: the whole workflow on the bundled sample.

A small white square is stamped on 75 of 5,000 training images, all of them sneakers, and they are labelled
as pullovers. A model trained on them is as accurate as one that was not, but takes any sneaker with the
square for a pullover. From one such answer the training examples behind it are found and removed, and the
model is trained again.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from unpoison import data, report, workflow
from unpoison._artefacts import atomic_file
from unpoison.cli._console import Console, per_cent
from unpoison.cli._interrupts import Interrupts
from unpoison.cli._options import Demo
from unpoison.cli._search import keep_findings
from unpoison.cli._session import Session, session
from unpoison.cli._status import DONE
from unpoison.data import TrainingSet
from unpoison.detectors import Detector
from unpoison.errors import UnpoisonError
from unpoison.threats import Backdoor, Budget, PatchTrigger
from unpoison.training import Recipe, Trained

SOURCE, TARGET = "Sneaker", "Pullover"
_BUDGET = Budget(count=75)
PAGE = "report.html"


def demo(options: Demo, console: Console, interrupts: Interrupts) -> int:
    """Run it and keep everything: poison/, model/, control/, findings/, healed/ and the report."""
    with session(options, options.out, console, interrupts) as run:
        play(run, seed=options.run.seed)
        with run.stage("report"):
            _write_page(run)
    _show(run, console, options.out)
    return DONE


def play(
    run: Session,
    *,
    seed: int,
    recipe: Recipe | None = None,
    splits: data.Splits[data.TrainingSet] | None = None,
    budget: Budget = _BUDGET,
    method: str | Detector = "calibrated",
) -> None:
    """Poison, train, look for a wrong prediction, trace it, heal, measure.

    Arguments:
        run: where artefacts and results go.
        seed: of everything.
        recipe: how every model is trained; the preset `sample` when None.
        splits: data with the two classes of the demo; the bundled sample when None.
        budget: how much is poisoned.
        method: the detector.
    """
    recipe = Recipe.preset("sample") if recipe is None else recipe
    with run.stage("data"):
        splits = (data.sample() if splits is None else splits).to(run.device)
        if splits.test is None:
            raise UnpoisonError("demo: the sample has no test set")
        clean, test, names = splits.train, splits.test, splits.train.class_names

    with run.stage("craft"):
        goal = Backdoor(PatchTrigger.white_corner(), names.index(SOURCE), names.index(TARGET))
        poison = workflow.craft("badnets", goal, clean, budget=budget, seed=seed)
        poison.save(run.artefact("poison", "poison"))
        poisoned = poison.apply(clean)
    run.console.say(
        f"{len(poison)} of {len(clean)} training images: {SOURCE} with a white corner, labelled {TARGET}"
    )

    def trained(stage: str, what: str, training_set: TrainingSet, place: str) -> Trained:
        with run.stage(stage), run.console.progress(what) as progress:
            model = workflow.train(training_set, recipe, seed=seed, progress=progress)
            model.save(run.artefact(place, place))
        return model

    victim = trained("train", "training on the poisoned set", poisoned, "model")
    control = trained("control", "training on the clean set, to compare", clean, "control")

    with run.stage("observe"):
        observation = workflow.observe(victim, goal, test)
        if observation is None:
            raise UnpoisonError("demo: the poison had no effect with this seed; try another --seed")
        index = observation.indices[0]
    run.console.say(f"observed: test image {index}, a {SOURCE} with a white corner, is called {TARGET}")

    with run.stage("trace"), run.console.progress("tracing that one answer") as progress:
        findings = workflow.trace(
            victim, poisoned, observation, method=method, reference=test, seed=seed, progress=progress
        )
        keep_findings(run, findings, poisoned, poison)
    run.console.say(findings.summary)

    healed = victim
    if len(findings.flagged):
        with run.stage("heal"), run.console.progress("healing by retraining") as progress:
            healed = workflow.heal(victim, poisoned, findings, seed=seed, progress=progress)
            healed.save(run.artefact("healed", "healed"))

    with run.stage("measure"):
        for when, model in (("before", victim), ("after", healed), ("control", control)):
            run.measure(model, test, poison, when=when)
    run.results.update(
        poisons=len(poison),
        examples=len(clean),
        observed=index,
        source=SOURCE,
        target=TARGET,
        recipe=recipe.to_dict(),
        fingerprint=poisoned.fingerprint,
    )


def _write_page(run: Session) -> None:
    """The page of this run, which does not have its final name yet."""
    run.recorder.artefacts["report"] = PAGE
    run.recorder.record().save(run.directory)
    data = report.ReportData.from_runs([run.directory])
    data = dataclasses.replace(data, runs=tuple((run.out.name, record) for _, record in data.runs))
    with atomic_file(run.directory / PAGE) as staging:
        staging.write_text(report.render(data), encoding="utf-8", newline="\n")


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
