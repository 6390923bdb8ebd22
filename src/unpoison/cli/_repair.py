"""`unpoison repair`: a model and one of its wrong answers in, a model without the cause of it out."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import save_file

from unpoison import repair as repair_model
from unpoison import unlearners
from unpoison._repair import Repair as Done
from unpoison._repair import Round, unlearner_for
from unpoison.cli._console import Console
from unpoison.cli._inputs import healing_recipe
from unpoison.cli._interrupts import Interrupts
from unpoison.cli._options import Repair
from unpoison.cli._search import keep_findings
from unpoison.cli._session import Session, session
from unpoison.cli._status import DONE, FOUND
from unpoison.cli._tracing import Tracing
from unpoison.threats import PoisonSet
from unpoison.training import Trained


def repair(options: Repair, console: Console, interrupts: Interrupts) -> int:
    """Trace, heal and trace again; save the healed model and the findings of every round."""
    with session(options, options.out, console, interrupts) as run:
        with run.stage("data"):
            case = Tracing.of(options, run)
            subject = case.subject
            recipe = healing_recipe(options.training, subject.model)
            method = unlearners.get(options.unlearner)
            start = subject.fresh(method)
            unlearner = unlearner_for(
                subject.model,
                method,
                rounds=options.rounds,
                withheld=options.withheld,
                recipe=recipe,
                start=start,
            )
        with run.stage("repair"), console.progress("repair") as progress:
            case.calibrate(run, progress)
            done = repair_model(
                subject.model,
                case.training_set,
                case.observation,
                unlearner=unlearner,
                rounds=options.rounds,
                withheld=options.withheld,
                recipe=recipe,
                start=start,
                device=run.device,
                progress=progress,
                **case.given,
            )
        with run.stage("save"):
            _keep(run, done, case)
        with run.stage("measure"):
            run.measure(subject.model, case.splits.test, case.poison, when="before", task=subject.task)
            run.measure(done.model, case.splits.test, case.poison, when="after", task=subject.task)
        run.results.update(method=done.rounds[0].findings.method, unlearner=options.unlearner, **case.asked())
    console.show(
        done.summary,
        *case.told(),
        *run.compared(),
        f"the {'healed model' if len(done.removed) else 'record'} is {options.out}",
    )
    return DONE if done.outcome in ("repaired", "nothing found") else FOUND


def _keep(run: Session, done: Done, case: Tracing) -> None:
    """Write model/, removed.safetensors, findings/ of the first trace and rounds/N/ of the others."""
    keep_findings(run, done.rounds[0].findings, case.training_set, case.poison)
    for number, one in enumerate(done.rounds[1:], 2):
        place = f"rounds/{number}"
        one.findings.save(run.artefact(f"round {number}", place))
        save_file({"examples": one.examples.contiguous()}, run.directory / place / "examples.safetensors")
    if isinstance(done.model, Trained) and len(done.removed):
        done.model.save(run.artefact("model", "model"))
        save_file({"removed": done.removed.contiguous()}, run.artefact("removed", "removed.safetensors"))
    tuning = done.model.tuning if isinstance(done.model, Trained) else None
    run.results.update(
        outcome=done.outcome,
        repair=done.summary,
        removed=len(done.removed),
        tuning=dict(tuning) if tuning is not None else None,
        removed_indices=done.removed.tolist(),
        removed_poison=None if case.poison is None else _poison_in(done.removed, case.poison),
        rounds=[_row(one, case) for one in done.rounds],
    )


def _row(one: Round, case: Tracing) -> dict[str, Any]:
    """A round, for run.json and the report."""
    names = case.training_set.class_names
    return {
        "answers": [names[answer] for answer in one.answers],
        "copies": one.copies.to_dict(),
        "unforgotten": one.unforgotten.tolist(),
        "withheld": len(one.withheld),
        "mislabelled": one.mislabelled.tolist(),
        "p_value": one.findings.p_value,
        "flagged": len(one.flagged),
        "flagged_poison": None if case.poison is None else _poison_in(one.flagged, case.poison),
        "summary": one.findings.summary,
    }


def _poison_in(indices: torch.Tensor, poison: PoisonSet) -> int:
    return int(torch.isin(indices.cpu(), poison.indices.cpu()).sum())
